"""Regexes of strangers' configs match as `re` has them, and none takes long."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import glora
from glora import interop
from glora.interop.patterns import _letters, _parse, _ways_on, matches
from tests.helpers.marks import examples

PATH = "a" * 40 + "!"
HOSTILE = [
    "(a+)+b",
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+b",
    "(?:a?){40}a{40}b",
    "a?" * 40 + "a" * 40 + "b",
    "(a|b|ab)" * 40 + "c",
    ".*" * 8 + "b",
    "((a{30}){30}){30}",
    "(){4000000000}",
    r"(\w+\.?)*-",
    "(?=(a+)+b)a",
    "(?!(a|a)*b)c",
    r"(\w+\w)*b",
    r"(\w+!?)*b",
    r"(.*\.)*b",
    r"(\w+a)*b",
    r"([^.]+(\.|a))*b",
    r"(\w+(?=a))*b",
    r"(a!?|\w!?)*b",
    r"(?i)(b*A)*b",
    r"(\w*\b)*b",
]


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", r"\w", "(a|ab)", "(?:b|)"])
PARTS = st.tuples(ATOMS, st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,3}", "*?"])).map("".join)
PATTERNS = st.lists(st.lists(PARTS, max_size=5).map("".join), min_size=1, max_size=3).map("|".join)
# Groups that are repeated: with a separator that tells where one ends, and without.
INSIDE = st.lists(PARTS, min_size=1, max_size=3).map("".join)
NESTED = st.tuples(st.lists(INSIDE, min_size=1, max_size=2).map("|".join), st.sampled_from(["", "*", "+", "?"])).map(
    lambda drawn: f"({drawn[0]}){drawn[1]}"
)


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("end", [False, True])
def test_a_regex_that_would_take_for_ever_is_refused_at_once(pattern: str, end: bool) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="write it without"):
        matches(pattern, PATH, end=end)
    assert time.monotonic() - began < 5


class _Steps:
    """A matcher of parsed regexes that tries every way, as `re` does where there is no match, and counts its steps."""

    def __init__(self, path: str) -> None:
        self.path, self.count = path, 0

    def ends(self, parts: list[Any], start: int) -> Iterator[int]:
        if not parts:
            yield start
            return
        for end in self.part(*parts[0], start):
            yield from self.ends(parts[1:], end)

    def part(self, kind: Any, of: Any, start: int) -> Iterator[int]:
        self.count += 1
        if str(kind).endswith("REPEAT"):
            yield from self.repeat(*of[:2], list(of[2]), start)
        elif str(kind) == "BRANCH":
            for body in of[1]:
                yield from self.ends(list(body), start)
        elif str(kind) == "SUBPATTERN":
            yield from self.ends(list(of[3]), start)
        elif start < len(self.path) and _letters(str(kind), of) >> ord(self.path[start]) & 1:
            yield start + 1

    def repeat(self, least: int, most: int, body: list[Any], start: int) -> Iterator[int]:
        if most:
            for end in self.ends(body, start):
                if end > start or least:  # an empty repetition is tried once
                    yield from self.repeat(max(0, least - 1), most - 1, body, end)
        if not least:
            yield start


@pytest.mark.parametrize("letters_tell", [False, True])
@examples(200)
@given(st.lists(NESTED, min_size=1, max_size=3).map("".join), st.text("ab.", max_size=10))
def test_a_regex_takes_no_more_steps_than_its_ways(letters_tell: bool, pattern: str, path: str) -> None:
    """Counted, not timed: each way passes through each part at each letter at most, and looks at the next letters."""
    bound = _ways_on(pattern, len(path), letters_tell)
    assume(bound < 1e4)
    steps = _Steps(path)
    assert sum(1 for end in steps.ends(list(_parse(pattern)), 0) if end == len(path)) <= bound
    assert steps.count <= bound * (len(pattern) + 1) * (len(path) + 1) * 2


@given(PATTERNS, st.text("ab.", max_size=12))
def test_it_matches_as_re_does_or_refuses(pattern: str, path: str) -> None:
    """Where nothing is nested (the atoms with several ways are never repeated but by their own), none is refused."""
    try:
        ended, whole = matches(pattern, path, end=True), matches(pattern, path)
    except ValueError:
        assert re.search(r"\)[*+{?]|([*+?}].*){4}", pattern)
        return
    assert ended == bool(re.match(rf"(.*\.)?({pattern})$", path))
    assert whole == bool(re.fullmatch(pattern, path))


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r".*\.layers\.(0|1|2|3|10|11)\..*_proj",
        r".*self_attn.*(q|k)_proj",
        "|".join(re.escape(f"model.layers.{layer}.q_proj") for layer in range(2000)),
        r"^model\.layers\.7\.q_proj",
        r".*\.(q|v)_proj",
        r"(\w+\.)*q_proj",
        r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        r"model(\.\w+)*\.q_proj",
        r"(?:[^.]+\.)+(q|k|v|o)_proj",
        r"^(.*\.)?(q|k|v|o)_proj$",
        r"((model|layers|self_attn|\d+)\.)*q_proj",
    ],
)
def test_what_people_write_is_matched(pattern: str) -> None:
    assert matches(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+", "model.layers.7.self_attn.dense")
    assert not matches(pattern, "model.layers.7.self_attn.dense", end=True)
    matches(pattern, "base.text_model.encoder.layers.11.self_attn.q_proj", end=True)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "feedforward_modules"])
def test_a_hostile_config_is_named(field: str, tmp_path: Path) -> None:
    name = "a" * 40
    config: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, field: {"(a+)+b": 1}}
    shapes = {"lora_A.weight": (1, 3), "lora_B.weight": (2, 1)}
    if field == "feedforward_modules":
        config = {"peft_type": "IA3", field: "(a+)+b"}
        shapes = {"ia3_l": (2, 1)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{name}.{key}": torch.ones(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    began = time.monotonic()
    with pytest.raises(glora.AdapterFileError, match=r"adapter_config\.json do not .* the regex '\(a\+\)\+b'"):
        interop.load_peft(nn.ModuleDict({name: nn.Linear(3, 2)}), tmp_path)
    assert time.monotonic() - began < 5
