"""The extracted adapter is the nearest one: what was planted comes back, the rest is as singular values say."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import glora
from tests.helpers.calls import FORMS, LORA, attach, only, quiet, warned
from tests.helpers.files import sharded
from tests.helpers.kinds import KINDS
from tests.helpers.models import TOKENS, build
from tests.helpers.state import unchanged
from tests.helpers.strategies import Case, cases, configs

DOUBLES = [torch.float64]
BOTH = st.sampled_from(["hadamard", "matmul"])


def planted(layer: nn.Module, config: glora.GLoRAConfig, **arguments: Any) -> nn.Module:
    """A fine-tuned copy of a model: what an adapter of this config made of it."""
    with quiet():
        return glora.merge(attach(copy.deepcopy(layer), replace(config, init="random"), **arguments))


def errors(printed: str) -> list[float]:
    """The relative errors of a table: in all, and of each layer."""
    return [float(found) / 100 for found in re.findall(r"([\d.]+)%", printed)]


def distance(layer: nn.Module, tuned: nn.Module) -> float:
    return (layer.weight - tuned.weight).norm().item()


@given(st.sampled_from([(p, f) for p in "ABCDE" for f in FORMS[p][:-1]]), BOTH, cases(dtypes=DOUBLES, max_adapters=1))
def test_a_path_alone_comes_back(planted_path: tuple[str, str], product: str, case: Case) -> None:
    path, form = planted_path
    plain = replace(case, bias=True).plain()
    config = only(**{path: form}, rank=2, alpha=3.0, product=product)
    tuned = planted(plain, config)
    wanted = tuned.state_dict()
    layer = glora.extract(plain, tuned, config=config)
    for name, tensor in wanted.items():
        torch.testing.assert_close(getattr(layer, name), tensor, rtol=0, atol=1e-4 * (1 + tensor.abs().max().item()))


@given(cases(dtypes=DOUBLES, max_adapters=1), st.integers(1, 5))
def test_b_alone_is_the_nearest_of_its_rank(capsys: Any, case: Case, rank: int) -> None:
    plain, tuned = case.plain(), replace(case, seed=case.seed + 7).plain()
    apart = tuned.weight - plain.weight
    capsys.readouterr()
    layer = glora.extract(plain, tuned, config=glora.GLoRAConfig.lora(rank=rank, alpha=5))
    best = torch.linalg.svdvals(apart)[rank:].norm().item()
    assert distance(layer, tuned) == pytest.approx(best, abs=1e-6 * apart.norm().item())
    bias = 0.0 if tuned.bias is None else (tuned.bias - layer.bias).norm().item()
    changed = (apart.square().sum() + (bias**2)).sqrt().item()
    share = (best**2 + bias**2) ** 0.5 / changed
    assert errors(capsys.readouterr().out) == pytest.approx([share, share], abs=1e-4)


@given(cases(dtypes=DOUBLES, max_adapters=1), configs(needs="A"), configs(needs="B"))
def test_both_paths_are_as_close_as_either(case: Case, first: glora.GLoRAConfig, second: glora.GLoRAConfig) -> None:
    plain, tuned = case.plain(), replace(case, seed=case.seed + 7).plain()
    A = first.A if first.A != "none" else "vector"
    B = second.B if second.B != "none" else "vector"
    found = {}
    for name, forms in (("both", {"A": A, "B": B}), ("A", {"A": A}), ("B", {"B": B})):
        config = only(**forms, rank=first.rank, product=first.product)
        found[name] = distance(glora.extract(copy.deepcopy(plain), tuned, config=config), tuned)
    assert found["both"] <= min(found["A"], found["B"]) * (1 + 1e-3) + 1e-9


@given(cases(dtypes=DOUBLES, max_adapters=1, max_size=(12, 9)))
def test_an_elementwise_a_is_as_near_as_a_minimum_is(case: Case) -> None:
    plain, tuned = case.plain(), replace(case, seed=case.seed + 7).plain()
    layer = glora.extract(plain, tuned, config=only(A="lora", rank=1))
    loss = (layer.weight - tuned.weight.detach()).square().sum()
    gradients = torch.autograd.grad(loss, list(glora.parameters(layer)))
    scale = (tuned.weight - plain.parametrizations.weight.original).square().sum().item()
    for gradient, parameter in zip(gradients, glora.parameters(layer), strict=True):
        assert (gradient * parameter).abs().sum().item() <= 0.2 * scale
    assert loss.item() <= scale


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_matrix_and_a_bias_to_the_bit_of_the_dtype(kind: Any) -> None:
    model, x = kind.build().double().eval(), kind.input().double()
    config = glora.GLoRAConfig(A="none", B="lora", C="none", D="none", E="vector", rank=2)
    tuned = planted(model, config, targets=[kind.path])
    wanted = kind.call(tuned, x)
    with quiet():
        glora.extract(model, tuned, [kind.path], config)
    torch.testing.assert_close(kind.call(model, x), wanted)


SOURCES: dict[str, Callable[[nn.Module, Path], object]] = {
    "a module": lambda tuned, _: tuned,
    "an adapted module": lambda tuned, _: attach(tuned, replace(LORA, init="identity"), targets=["first"]),
    "a state dict": lambda tuned, _: tuned.state_dict(),
    "a file": lambda tuned, folder: (save_file(tuned.state_dict(), folder / "a.safetensors"), folder / "a.safetensors")[
        1
    ],
    "a folder": lambda tuned, folder: (save_file(tuned.state_dict(), folder / "a.safetensors"), str(folder))[1],
    "an index": lambda tuned, folder: sharded(folder / "s", tuned),
    "a sharded folder": lambda tuned, folder: sharded(folder / "s", tuned).parent,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_tuned_model_with_its_heads(
    source: Callable[[nn.Module, Path], object], tmp_path: Path
) -> None:
    model = build()
    tuned = planted(model, LORA, targets=["first", "second"], trainable=["head"])
    with torch.no_grad():
        tuned.head.weight.add_(1)
    wanted = tuned(TOKENS)
    glora.extract(model, source(tuned, tmp_path), ["first", "second"], LORA, trainable=["head"], name="x")
    torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert glora.adapters(model) == {"x": 1.0}
    assert torch.equal(glora.state_dict(model)["head.weight"], tuned.head.weight)


def test_what_else_was_changed_is_named() -> None:
    model = build()
    tuned = planted(model, LORA, targets=["first"])
    with torch.no_grad():
        tuned.norm.bias.add_(1)
    (message,) = warned(lambda: glora.extract(copy.deepcopy(model), tuned, ["first"], LORA))
    assert "1 tensors that are not the base's" in message
    assert "norm.bias" in message
    tensors = tuned.state_dict() | {"extra.weight": torch.zeros(1)}
    (message,) = warned(lambda: glora.extract(copy.deepcopy(model), tensors, ["first"], LORA, trainable=["norm"]))
    assert "extra.weight" in message
    assert not warned(lambda: glora.extract(copy.deepcopy(model), tuned, ["first"], LORA, trainable=["norm"]))


@pytest.mark.parametrize("front", ["bert", ""])
def test_a_backbones_keys_are_found_with_one_component_more_or_less(front: str) -> None:
    model = nn.ModuleDict({"bert": build()})
    tuned = planted(model, LORA, targets=["bert.first", "bert.second"])
    tensors = {key.removeprefix("bert.") if not front else f"all.{key}": t for key, t in tuned.state_dict().items()}
    glora.extract(model, tensors, ["bert.first", "bert.second"], LORA)
    torch.testing.assert_close(model.bert(TOKENS), tuned.bert(TOKENS), rtol=1e-4, atol=1e-4)


def without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (without("first.weight"), "'first.weight' found none"),
        (without("first.bias"), "'first.bias' found none"),
        (without("head.bias"), "'head.bias' found none"),
        (lambda tensors: tensors.update({"first.weight": torch.zeros(2, 2)}), r"found \(2, 2\) for \(6, 4\)"),
        (lambda tensors: tensors["first.weight"].fill_(torch.nan), "not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    damage: Callable[[dict[str, Tensor]], object], match: str
) -> None:
    model = build()
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    damage(tensors)
    with unchanged(model), pytest.raises(ValueError, match=match):
        glora.extract(model, tensors, ["first"], LORA, trainable=["head"])


def test_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model = build()
    with unchanged(model):
        with pytest.raises(FileNotFoundError, match=r"one \.safetensors file"):
            glora.extract(model, tmp_path, ["first"], LORA)
        with pytest.raises(FileNotFoundError):
            glora.extract(model, tmp_path / "nowhere.safetensors", ["first"], LORA)
        with pytest.raises(ValueError, match="tuned must be"):
            glora.extract(model, 5, ["first"], LORA)
