"""Model cards: they say what was saved, a hub can read them, and a person's own is left alone."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers import internals
from tests.helpers.files import saved, small_model
from tests.helpers.strategies import Case, cases

CARD = "README.md"


def front(folder: Path) -> dict[str, Any]:
    """What a hub reads: the YAML between the first two lines of dashes."""
    return yaml.safe_load((folder / CARD).read_text().split("---\n")[1])


def rows(folder: Path) -> list[list[str]]:
    """The table of layers."""
    lines = (folder / CARD).read_text().partition("## Layers")[2].strip().splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@given(cases(max_adapters=1))
def test_it_says_forms_sizes_and_ranks(tmp_path_factory: Any, case: Case) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    layer = nn.Sequential(case.build())
    name = next(iter(glora.adapters(layer)))
    glora.save(layer, folder, name)
    (row,) = rows(folder)
    (summary,) = glora.summary(layer).rows
    assert row[0] == "`*`"
    assert row[3].removesuffix(" (matrix product)") == summary.forms
    assert row[4] == ("-" if summary.rank is None else str(summary.rank))
    numbers = sum(tensor.numel() for tensor in glora.state_dict(layer, name).values())
    assert f"{numbers:,} numbers" in (folder / CARD).read_text()
    assert front(folder) == {"library_name": "glora", "tags": ["glora", "adapter"]}


def test_layers_that_differ_by_numbers_are_one_row_and_heads_are_there(tmp_path: Path) -> None:
    blocks = [nn.ModuleDict({"q|k": nn.Linear(4, 4), "v": nn.Linear(4, 2)}) for _ in range(12)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(2, 3)})
    config = glora.GLoRAConfig.repadapter(rank=2, alpha=3)
    glora.save(glora.apply(model, r"blocks.*", config, trainable=["head"]), tmp_path)
    assert rows(tmp_path) == [
        ["`blocks.*.q\\|k`", "12", "4 x 4", "A=lora C=vector (matrix product)", "2", "3"],
        ["`blocks.*.v`", "12", "2 x 4", "A=lora C=vector (matrix product)", "2", "3"],
        ["`head`", "1", "-", "trained as a whole: 9 numbers", "-", "-"],
    ]


def test_many_kinds_of_layers_are_counted_and_not_listed(tmp_path: Path) -> None:
    model = nn.ModuleDict({f"layer_{i}x": nn.Linear(2, 2) for i in range(60)})
    glora.save(glora.apply(model, config=glora.GLoRAConfig.glora()), tmp_path)
    assert len(rows(tmp_path)) == 51
    assert rows(tmp_path)[-1][0] == "and 10 more"


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("FacebookAI/roberta-base", True),
        ("gpt2", True),
        ("/home/me/private", False),
        ("", False),
        ("checkpoint-7", False),
    ],
)
def test_the_base_is_named_where_a_hub_has_it(
    source: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-7").mkdir()
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model.config = SimpleNamespace(_name_or_path=source)
    glora.save(glora.apply(model, config=glora.GLoRAConfig.glora()), "adapter")
    text = (tmp_path / "adapter" / CARD).read_text()
    assert front(tmp_path / "adapter").get("base_model") == (source if known else None)
    assert not source or (source in text) is known
    assert ("base_model_relation" in text) is known


@given(st.text(max_size=200))
def test_what_a_person_wrote_stays(tmp_path_factory: Any, text: str) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    (folder / CARD).write_bytes(text.encode("utf-8", "replace"))
    saved(folder)
    assert (folder / CARD).read_bytes() == text.encode("utf-8", "replace")


def test_its_own_is_replaced_until_the_line_is_taken_out(tmp_path: Path) -> None:
    saved(tmp_path)
    card = tmp_path / CARD
    written = card.read_text()
    card.write_text(written + "more\n")
    saved(tmp_path)
    assert card.read_text() == written
    own = written.replace(internals.CARD_MARKER, "")
    card.write_text(own)
    saved(tmp_path)
    assert card.read_text() == own


def test_a_link_or_a_folder_in_its_place_is_left(tmp_path: Path) -> None:
    (tmp_path / "a" / CARD).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / CARD).symlink_to(tmp_path / "elsewhere")
    for name in ("a", "b"):
        saved(tmp_path / name)
        glora.load(small_model(), tmp_path / name)
    assert (tmp_path / "a" / CARD).is_dir()
    assert (tmp_path / "b" / CARD).is_symlink()


def test_how_to_load_is_what_works(tmp_path: Path) -> None:
    made = saved(tmp_path)
    text = (tmp_path / CARD).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    lines = code[1].replace("path/to/this/folder", str(tmp_path)).replace("model = ...", "pass")
    names: dict[str, Any] = {"model": small_model()}
    exec(lines, names)
    x = torch.randn(3, 5)
    torch.testing.assert_close(names["model"].eval()(x), made.eval()(x))
