"""Hot swap: `load(..., replace=True)` puts a file in the place of a live adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora.integrations.active import restore
from glora.model.state import describe
from tests.helpers.calls import LORA, RANDOM, attach, only, step
from tests.helpers.files import stored_sum
from tests.helpers.models import TOKENS, build
from tests.helpers.state import all_adapters, clones, same, unchanged
from tests.helpers.strategies import Case, cases, configs


def saved_twin(case: Case, config: glora.GLoRAConfig, folder: Path) -> nn.Module:
    """Another adapter on the same base, saved."""
    other = attach(case.plain(), config)
    with torch.no_grad():
        for parameter in glora.parameters(other):
            parameter.normal_()
    glora.save(other, folder)
    return other


@given(cases(max_adapters=2, create_bias=False), st.integers(1, 4), st.sampled_from([None, 1.0, 6.0]))
def test_of_the_same_forms_it_is_written_into_the_same_parameters(
    tmp_path_factory: Any, case: Case, rank: int, alpha: float | None
) -> None:
    folder, again = tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("again")
    layer = case.build()
    live = describe(layer, "a0").layers[""].config
    wanted = saved_twin(case, replace(case.configs[0], rank=rank, alpha=alpha), folder)
    held = dict(glora.named_parameters(layer, "a0"))
    others = {name: clones(tensors) for name, tensors in all_adapters(layer).items() if name != "a0"}
    glora.load(layer, folder, "a0", replace=True, strict=True)
    low_rank = "lora" in live.forms.values()
    assert all(a is b for a, b in zip(held.values(), glora.parameters(layer, "a0"), strict=True)) == (
        not low_rank or rank <= live.rank
    )
    assert glora.adapters(layer) == {name: float(name == "a0") for name in case.named_weights}
    for computed, expected in ((layer.weight, wanted.weight), (layer.bias, wanted.bias)):
        if rank < live.rank and computed is not None:
            # Filled up with zeros, a product of another length: it may be summed in another order.
            torch.testing.assert_close(computed, expected)
        else:
            assert (computed is None and expected is None) or torch.equal(computed, expected)
    assert all(same(others[name], glora.state_dict(layer, name)) for name in others)
    glora.save(layer, again, "a0")
    assert stored_sum(again) == stored_sum(folder)


@given(cases(max_adapters=2), configs())
def test_whatever_the_forms_it_is_the_file_and_the_others_stay(
    tmp_path_factory: Any, case: Case, config: glora.GLoRAConfig
) -> None:
    folder = tmp_path_factory.mktemp("new")
    layer = case.build()
    wanted = saved_twin(case, config, folder)
    others = {name: clones(tensors) for name, tensors in all_adapters(layer).items() if name != "a0"}
    glora.load(layer, folder, "a0", replace=True)
    assert torch.equal(layer.weight, wanted.weight)
    assert all(same(others[name], glora.state_dict(layer, name)) for name in others)
    assert (
        same(glora.state_dict(layer, "a0"), glora.state_dict(wanted))
        or describe(layer, "a0").layers[""] == describe(wanted).layers[""]
    )
    for name in others:
        glora.delete(layer, name)
    plain = case.plain()
    assert set(glora.remove(layer).state_dict()) == set(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    assert [p.requires_grad for p in layer.parameters()] == [True] * len(list(plain.parameters()))


def graphs(model: nn.Module, x: Tensor) -> tuple[Any, list[int]]:
    """The compiled model, and a list that grows by one for each graph."""
    count: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        count.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    return compiled, count


@pytest.mark.parametrize("first", [None, 6.0])
@pytest.mark.parametrize("config", [RANDOM, LORA, only(A="lora", B="vector", C="lora", E="constant")], ids=str)
def test_no_new_graph_whatever_rank_and_scale(config: glora.GLoRAConfig, first: float | None, tmp_path: Path) -> None:
    plain, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), torch.randn(3, 6)
    for number, alpha in enumerate((None, 1.0, 6.0)):
        other = attach(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
            replace(config, init="random", rank=number + 1, alpha=alpha),
        )
        glora.save(other, tmp_path / str(number))
    model = attach(plain, replace(config, init="random", rank=3, alpha=first), name="a")
    compiled, count = graphs(model, x)
    before = len(count)
    for number in (0, 1, 2, 0):
        glora.load(model, tmp_path / str(number), "a", replace=True, check=False)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(count) == before


def test_an_optimizer_goes_on_and_what_trained_the_padding_is_saved_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    model = attach(nn.Linear(6, 5), LORA.lora(rank=4, alpha=8, init="random"))
    model.load_state_dict(base.state_dict())
    small = attach(nn.Linear(6, 5), LORA.lora(rank=2, alpha=1, init="random"))
    glora.save(small, tmp_path / "small")
    optimizer, x = torch.optim.SGD(glora.parameters(model), lr=0.1), torch.randn(7, 6)
    glora.load(model, tmp_path / "small", replace=True, check=False)

    before = model(x)
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    assert describe(model).layers[""].config.rank == 2
    assert not glora.state_dict(model)["B.left"][:, 2:].any()
    glora.reset_parameters(model)
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.normal_()
    described = describe(model).layers[""].config
    assert (described.rank, described.scaling) == (4, 0.5)
    glora.save(model, tmp_path / "whole")
    other = nn.Linear(6, 5)
    other.load_state_dict(base.state_dict())
    assert torch.equal(glora.load(other, tmp_path / "whole").weight, model.weight)


def test_a_padded_adapter_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model = attach(build(), replace(RANDOM, rank=3), targets=["first", "third"], trainable=["head"])
    small = attach(build(), replace(RANDOM, rank=2, alpha=3), targets=["first", "third"], trainable=["head"])
    glora.save(small, tmp_path)
    glora.load(model, tmp_path, replace=True, check=False)
    spec, before = describe(model), model(TOKENS)
    spec = replace(spec, tensors=clones(spec.tensors))
    step(model, TOKENS)
    assert not torch.equal(model(TOKENS), before)
    restore(model, spec, "a checkpoint")
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("heads", [["head"], ["norm", "head"], []])
def test_heads_are_swapped_too(heads: list[str], trainable: bool, tmp_path: Path) -> None:
    model = attach(build(), RANDOM, targets=["first"], trainable=["head"])
    base = build()
    base.load_state_dict(glora.base_state_dict(model))
    other = attach(base, RANDOM, targets=["first"], trainable=heads)
    with torch.no_grad():
        for parameter in glora.parameters(other):
            parameter.add_(0.3)
    glora.save(other, tmp_path)
    held = list(glora.parameters(model))
    glora.load(model, tmp_path, replace=True, strict=True, trainable=trainable)
    assert torch.equal(model(TOKENS), other(TOKENS))
    assert [p.requires_grad for p in glora.parameters(model)] == [trainable] * len(list(glora.parameters(other)))
    assert (held[0] is next(glora.parameters(model))) == (heads == ["head"])
    with glora.disabled(model), glora.disabled(other):
        assert torch.equal(model(TOKENS), other(TOKENS))


@pytest.mark.parametrize("rank", [1, 4])
def test_what_was_unfrozen_meanwhile_is_frozen_as_by_any_load(rank: int, tmp_path: Path) -> None:
    model = attach(build(), replace(RANDOM, rank=2), targets=["first"])
    base = build()
    base.load_state_dict(glora.base_state_dict(model))
    glora.save(attach(base, replace(RANDOM, rank=rank), targets=["first"]), tmp_path)
    model.requires_grad_()
    glora.load(model, tmp_path, replace=True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, glora.parameters(model)))


def test_a_file_that_does_not_fit_and_an_unknown_name_change_nothing(tmp_path: Path) -> None:
    model = attach(build(), RANDOM, name="a", trainable=["head"])
    glora.save(attach(nn.Sequential(nn.Linear(4, 6)), RANDOM), tmp_path / "other")
    glora.save(model, tmp_path / "a")
    with unchanged(model):
        with pytest.raises(glora.AdapterFileError, match="nothing was changed"):
            glora.load(model, tmp_path / "other", "a", replace=True)
        with pytest.raises(KeyError, match="'b' is not an adapter of the model"):
            glora.load(model, tmp_path / "a", "b", replace=True)
        with pytest.raises(ValueError, match="check=False"):
            glora.load(model, tmp_path / "a", "a", replace=True, strict=True, check=False)
        with glora.merged(model), pytest.raises(RuntimeError):
            glora.load(model, tmp_path / "a", "a", replace=True)


@pytest.mark.parametrize("rank", [1, 4])
def test_another_base_is_named_and_check_leaves_it_out(rank: int, tmp_path: Path) -> None:
    glora.save(attach(nn.Linear(6, 5), glora.GLoRAConfig.lora(rank=rank, init="random")), tmp_path)
    model = attach(nn.Linear(6, 5), glora.GLoRAConfig.lora(rank=2))
    with unchanged(model), pytest.raises(glora.AdapterFileError, match="weight"):
        glora.load(model, tmp_path, replace=True, strict=True)
    with pytest.warns(UserWarning, match="weight") as caught:
        glora.load(model, tmp_path, replace=True)
    assert caught[0].filename == __file__
    glora.load(model, tmp_path, replace=True, check=False)
    glora.load(glora.remove(model), tmp_path, check=False)
