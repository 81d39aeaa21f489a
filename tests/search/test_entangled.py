"""Every entangled form is the stand-alone one: output, gradients, parameters; draws are seeded, replayed and even."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import glora
from glora import GLoRAConfig
from glora.search import Space, choose
from tests.helpers.calls import FORMS, quiet
from tests.helpers.search import any_config, block, inherited, spaces, supernet
from tests.helpers.strategies import DTYPES, close


def stand_alone(layer: nn.Linear, whole: dict[str, Tensor], config: GLoRAConfig) -> nn.Linear:
    """The layer with an ordinary adapter of this config, its tensors cut from those of the largest."""
    if not config.paths:
        return layer.requires_grad_(False)
    with quiet():
        glora.apply(layer, config=config)
    glora.load_state_dict(layer, {key: tensor.clone() for key, tensor in inherited(whole, "", config).items()})
    return layer


def check_equal(plain: nn.Linear, space: Space, config: GLoRAConfig) -> None:
    x = torch.randn(5, plain.in_features, dtype=plain.weight.dtype)
    net = supernet(copy.deepcopy(plain), space)
    whole = {key: tensor.clone() for key, tensor in glora.state_dict(net).items()}
    alone = stand_alone(copy.deepcopy(plain), whole, config)
    choose(net, {"": config})
    assert close(net.weight, alone.weight.double())
    y, wanted = net(x), alone(x)
    assert close(y, wanted.double(), ulps=16)
    if not config.paths:
        return
    g = torch.randn_like(y)
    y.backward(g)
    wanted.backward(g)
    full = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in glora.named_parameters(net)}
    cut = inherited(full, "", config)
    for key, parameter in glora.named_parameters(alone):
        assert close(cut[key], parameter.grad.double(), ulps=64 if plain.weight.dtype.itemsize > 2 else 2**17)
    kept = sum(tensor.abs().sum() for tensor in cut.values())
    assert torch.isclose(kept, sum(tensor.abs().sum() for tensor in full.values()), rtol=1e-4)  # and nowhere else


@given(
    space=spaces(),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_every_form_equals_the_one_of_its_own(
    space: Space, seed: int, dtype: torch.dtype, bias: bool, size: tuple[int, int]
) -> None:
    torch.manual_seed(seed)
    config = any_config(space if bias else space.only("A", "B"), seed)
    check_equal(nn.Linear(*size, bias=bias, dtype=dtype), space, config)


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_all_432_forms(product: str) -> None:
    space = Space(ranks=[1, 3], alpha=6.0, product=product)
    plain, count = nn.Linear(4, 5), 0
    for forms in itertools.product(*FORMS.values()):
        check_equal(plain, space, space.config(dict(zip(FORMS, forms, strict=True)), 3))
        count += 1
    assert count == 432


def test_alpha_is_divided_by_the_chosen_rank() -> None:
    layer = supernet(nn.Linear(4, 5), Space(A=["none"], ranks=[1, 4], alpha=4.0))
    left, right = glora.state_dict(layer)["B.left"], glora.state_dict(layer)["B.right"]
    W0 = glora.base_state_dict(layer)["weight"]
    choose(layer, {"": GLoRAConfig.lora(rank=1, alpha=4.0)})
    assert close(layer.weight, (W0 + 4.0 * left[:, :1] @ right[:1]).double())
    choose(layer, {"": GLoRAConfig.lora(rank=4, alpha=4.0)})
    assert close(layer.weight, (W0 + left @ right).double())


def test_eval_is_deterministic_and_the_largest() -> None:
    net = supernet(block()).eval()
    x = torch.randn(3, 6)
    y = net(x)
    largest = {path: space.largest for path, space in glora.search.spaces(net).items()}
    for _ in range(3):
        assert torch.equal(net(x), y)
    assert torch.equal(choose(net, largest)(x), y)
    state = torch.get_rng_state()
    net(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_choice_acts_in_training_too_and_none_draws_again() -> None:
    net, x = supernet(block()).train(), torch.randn(3, 6)
    assert len({net(x).sum().item() for _ in range(20)}) > 10
    choose(net, {"0": GLoRAConfig.lora(rank=2)})
    assert len({net(x).sum().item() for _ in range(20)}) == 1
    choose(net, None)
    assert len({net(x).sum().item() for _ in range(20)}) > 10


def test_what_is_read_is_never_drawn() -> None:
    net = supernet(block()).train()
    assert torch.equal(net[0].weight, net[0].weight)
    before = net[0].weight
    assert torch.equal(glora.merge(net)[0].weight, before)


def outputs(seed: int, torch_seed: int) -> list[float]:
    torch.manual_seed(0)
    net, x = supernet(block(), seed=seed).train(), torch.randn(3, 6)
    torch.manual_seed(torch_seed)
    return [net(x).sum().item() for _ in range(10)]


def test_the_draws_are_seeded() -> None:
    assert outputs(0, 1) == outputs(0, 1)
    assert outputs(0, 1) != outputs(1, 1)


def forms_drawn(layer: nn.Linear, forwards: int) -> dict[str, Counter[str]]:
    """How often each form of each path acted, seen from the gradients."""
    found = {path: Counter[str]() for path in FORMS}
    for _ in range(forwards):
        layer.zero_grad()
        layer(torch.randn(3, 4, requires_grad=True)).square().sum().backward()
        grads = {key: p.grad for key, p in glora.named_parameters(layer)}
        for path in FORMS:
            left = grads.get(f"{path}.left", grads.get(f"{path}.value"))
            right = grads.get(f"{path}.right")
            moved = 0 if left is None else int((left != 0).sum())
            form = "lora" if right is not None and right.any() else "vector" if moved > 1 else "constant"
            found[path]["none" if not moved else form] += 1
    return found


def test_each_form_is_drawn_about_equally_often() -> None:
    layer, forwards = supernet(nn.Linear(4, 5), Space(ranks=[2])).train(), 600
    for path, counts in forms_drawn(layer, forwards).items():
        share = 1 / len(FORMS[path])
        deviation = (forwards * share * (1 - share)) ** 0.5
        assert set(counts) == set(FORMS[path])
        assert all(abs(count - forwards * share) < 4 * deviation for count in counts.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_draws(reentrant: bool) -> None:
    torch.manual_seed(0)
    net = supernet(block()).train()
    x = torch.randn(3, 6, requires_grad=True)

    def grads(run: object) -> list[Tensor | None]:
        torch.manual_seed(5)
        fresh, y = copy.deepcopy(net), 0
        for _ in range(4):  # all pending at once
            y = y + (checkpoint(fresh, x, use_reentrant=reentrant) if run else fresh(x)).square().sum()
        y.backward()
        return [p.grad for p in glora.parameters(fresh)]

    for replayed, plain in zip(grads(True), grads(False), strict=True):
        assert (replayed is None) == (plain is None)
        assert replayed is None or torch.allclose(replayed, plain, atol=1e-5)


def test_draws_that_cannot_be_replayed_are_refused() -> None:
    net, x = supernet(block()).train(), torch.randn(3, 6, requires_grad=True)
    y = checkpoint(net, x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="preserve_rng_state"):
        y.sum().backward()


def test_a_copy_draws_and_chooses_by_itself() -> None:
    net, x = supernet(block()).eval(), torch.randn(3, 6)
    twin, y = copy.deepcopy(net), net(x)
    choose(twin, {"0": GLoRAConfig.lora(rank=2)})
    assert torch.equal(net(x), y)
    assert not torch.equal(twin(x), y)


def test_torchs_removal_of_the_weight_freezes_the_prompt_that_acted() -> None:
    torch.manual_seed(0)
    net = supernet(nn.Linear(4, 3), Space(A=["none"], B=["vector"], C=["vector"], D=["none"], E=["vector"]))
    for parameter in glora.parameters(net):
        nn.init.normal_(parameter)
    bias = net.bias.detach().clone()
    nn.utils.parametrize.remove_parametrizations(net, "weight")
    assert torch.allclose(net.bias, bias, atol=1e-6)
