"""GLoRAConfig: which values each field takes, what it says of the others, and what the presets stand for."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glora import GLoRAConfig
from tests.helpers.calls import FORMS

ALLOWED: dict[str, tuple[str, ...]] = {
    **FORMS,
    "product": ("hadamard", "matmul"),
    "init": ("identity", "random"),
}
NOT_A_CHOICE = ["LoRA", "lora ", "", "full", "zero", None, True, 0, 1.0, ["lora"], torch.zeros(1)]


def test_the_defaults_are_those_of_the_contract() -> None:
    assert dataclasses.asdict(GLoRAConfig()) == {
        "A": "none",
        "B": "lora",
        "C": "none",
        "D": "none",
        "E": "none",
        "rank": 8,
        "alpha": None,
        "balance": "rms",
        "product": "hadamard",
        "init": "identity",
        "rank_dropout": 0.0,
        "create_bias": False,
    }


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ALLOWED.items() for value in values])
def test_a_choice_takes_each_of_its_values(field: str, value: str) -> None:
    choice: Any = {field: value}
    assert getattr(GLoRAConfig(**choice), field) == value


@pytest.mark.parametrize("field", ALLOWED)
@pytest.mark.parametrize("value", NOT_A_CHOICE, ids=repr)
def test_a_choice_refuses_every_other_value_and_says_which_are_allowed(field: str, value: object) -> None:
    choice: Any = {field: value}
    with pytest.raises(ValueError, match=rf"^{field} ") as refusal:
        GLoRAConfig(**choice)
    assert repr(value) in str(refusal.value)
    assert all(repr(allowed) in str(refusal.value) for allowed in ALLOWED[field])


@pytest.mark.parametrize(("path", "form"), [("C", "constant"), ("D", "lora"), ("E", "lora")])
def test_a_form_of_another_path_is_refused(path: str, form: str) -> None:
    choice: Any = {path: form}
    with pytest.raises(ValueError, match=rf"^{path} .*{form!r}"):
        GLoRAConfig(**choice)


def test_every_path_chooses_on_its_own() -> None:
    choices = list(itertools.product(*(ALLOWED[path] for path in "ABCDE")))
    assert len(choices) == 432
    for forms in choices:
        choice: Any = dict(zip("ABCDE", forms, strict=True))
        assert GLoRAConfig(**choice).forms == choice


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 1),
        ("rank", 4096),
        ("alpha", None),
        ("alpha", 1),
        ("alpha", 0.25),
        ("rank_dropout", 0),
        ("rank_dropout", 0.0),
        ("rank_dropout", 0.999),
        ("create_bias", True),
        ("create_bias", False),
    ],
)
def test_a_number_or_flag_takes_its_values(field: str, value: object) -> None:
    choice: Any = {field: value}
    assert getattr(GLoRAConfig(**choice), field) == value


@pytest.mark.parametrize(
    ("field", "allowed", "values"),
    [
        ("rank", "at least 1", [0, -1, 8.0, 1.5, "8", None, True, math.inf, torch.tensor(8)]),
        ("alpha", "positive", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, "16", True, 1j, torch.tensor(1.0)]),
        ("rank_dropout", r"\[0, 1\)", [1, 1.0, -0.1, 2, math.nan, math.inf, "0.1", None, True, False]),
        ("create_bias", "True or False", [None, 0, 1, "yes", torch.tensor(True)]),
    ],
)
def test_a_number_or_flag_refuses_every_other_value(field: str, allowed: str, values: list[object]) -> None:
    for value in values:
        choice: Any = {field: value}
        with pytest.raises(ValueError, match=rf"^{field} .*{allowed}") as refusal:
            GLoRAConfig(**choice)
        assert repr(value) in str(refusal.value)


def test_a_config_is_checked_when_it_is_replaced_too() -> None:
    assert dataclasses.replace(GLoRAConfig(), rank=2).rank == 2
    with pytest.raises(ValueError, match=r"^rank "):
        dataclasses.replace(GLoRAConfig(), rank=0)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GLoRAConfig)])
def test_a_config_is_frozen(field: str) -> None:
    config = GLoRAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))


def test_a_config_is_keyword_only() -> None:
    positional: Any = ("lora",)
    with pytest.raises(TypeError):
        GLoRAConfig(*positional)


def test_an_unknown_field_is_refused() -> None:
    unknown: Any = {"r": 8}
    with pytest.raises(TypeError, match="'r'"):
        GLoRAConfig(**unknown)


def test_equal_configs_are_equal_and_hash_alike() -> None:
    assert GLoRAConfig(rank=4) == GLoRAConfig(rank=4) != GLoRAConfig(rank=5)
    assert len({GLoRAConfig(rank=4), GLoRAConfig(rank=4), GLoRAConfig(rank=5)}) == 2


PRESETS: dict[str, tuple[dict[str, str], str]] = {
    "lora": ({"B": "lora"}, "hadamard"),
    "hira": ({"A": "lora"}, "hadamard"),
    "ssf": ({"A": "vector", "D": "vector", "E": "vector"}, "hadamard"),
    "bitfit": ({"E": "vector"}, "hadamard"),
    "prompt": ({"C": "vector"}, "hadamard"),
    "repadapter": ({"A": "lora", "C": "vector"}, "matmul"),
    "ia3": ({"A": "vector", "D": "vector"}, "hadamard"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_exactly_its_methods_forms(preset: str) -> None:
    forms, product = PRESETS[preset]
    config = getattr(GLoRAConfig, preset)()
    assert config.forms == dict.fromkeys("ABCDE", "none") | forms
    assert config.product == product
    # Everything else is as by default.
    assert dataclasses.replace(config, **GLoRAConfig().forms, product="hadamard") == GLoRAConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_takes_the_other_fields(preset: str) -> None:
    others = {"rank": 3, "alpha": 6.0, "init": "random", "rank_dropout": 0.1, "create_bias": True}
    config = dataclasses.asdict(getattr(GLoRAConfig, preset)(**others))
    assert config == config | others
    with pytest.raises(ValueError, match=r"^rank "):
        getattr(GLoRAConfig, preset)(rank=0)


@given(rank=st.integers(1, 512), alpha=st.floats(1e-3, 1e3))
def test_scaling_is_alpha_over_rank(rank: int, alpha: float) -> None:
    assert GLoRAConfig(rank=rank, alpha=alpha).scaling == alpha / rank
    assert GLoRAConfig(rank=rank).scaling == 1.0


@pytest.mark.parametrize(
    ("option", "near"),
    [("r", "rank"), ("lora_alpha", "alpha"), ("rnk", "rank"), ("target_modules", "targets="), ("products", "product")],
)
def test_an_unknown_option_names_the_nearest_field(option: str, near: str) -> None:
    for make in (GLoRAConfig, GLoRAConfig.lora, GLoRAConfig.ssf):
        with pytest.raises(TypeError, match=f"GLoRAConfig has no '{option}' \\(did you mean {near}"):
            make(**{option: 8})
    with pytest.raises(TypeError, match="GLoRAConfig has no 'zzz'; it has A, B, C, D, E, rank"):
        GLoRAConfig(zzz=1)  # pyright: ignore
    config = GLoRAConfig(rank=3)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config
