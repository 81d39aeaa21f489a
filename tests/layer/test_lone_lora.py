"""The shortcut of a LoRA that acts alone is taken for it alone, and gives what the general way gives."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from glora import torch_internals
from glora.layer import forward
from glora.layer.lone_lora import lone_lora
from tests.helpers.calls import LORA


def adapted(bias: bool = True, dtype: torch.dtype = torch.float32, **given: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = glora.apply(nn.Linear(5, 4, bias=bias).to(dtype), **{"config": LORA, **given})
    with torch.no_grad():
        for parameter in glora.parameters(layer):
            parameter.copy_(torch.randn_like(parameter))
    return layer


def results(layer: nn.Module, x: Tensor, graded: bool) -> list[Tensor]:
    x = x.detach().requires_grad_(graded)
    with torch.set_grad_enabled(graded):
        y = layer(x)
    if not graded:
        return [y]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *glora.parameters(layer)])]


@given(
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.sampled_from([(5,), (1, 5), (3, 5), (2, 3, 5), (0, 5), (1, 0, 5)]),
    graded=st.booleans(),
    training=st.booleans(),
    contiguous=st.booleans(),
)
def test_it_gives_what_the_general_way_gives(
    bias: bool, dtype: torch.dtype, shape: tuple[int, ...], graded: bool, training: bool, contiguous: bool
) -> None:
    layer = adapted(bias, dtype).train(training)
    x = torch.randn(shape, dtype=dtype)
    x = x if contiguous else torch.randn(*shape[:-1], 10, dtype=dtype)[..., ::2]
    with torch.set_grad_enabled(graded):
        assert (lone_lora(layer, x) is not None) is (graded or not training)
    found = results(layer, x, graded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "lone_lora", lambda *_: None)
        expected = results(layer, x, graded)
    assert all(map(torch.equal, found, expected))


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Own(Tensor):
    pass


def stacked(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Twice())


def beside(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "bias", Twice())


def both(layer: nn.Module) -> None:
    glora.apply(layer, config=LORA, name="other")
    glora.activate(layer, {"default": 1, "other": 1})


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda layer: layer.bfloat16(),
    "weighted": lambda layer: glora.activate(layer, {"default": 0.5}),
    "none acts": lambda layer: glora.activate(layer, {}),
    "another acts too": both,
    "parametrized on top": stacked,
    "its bias parametrized": beside,
    "W0 trains": lambda layer: layer.parametrizations.weight.original.requires_grad_(),
    "frozen": lambda layer: layer.requires_grad_(False),
    "factors of another dtype": lambda layer: layer.parametrizations.weight[0].default.double(),
    "no bias": lambda layer: layer._parameters.pop("bias"),
    "meta": lambda layer: layer.to("meta"),
    "without gradients in training": lambda _: torch.set_grad_enabled(False),
}
CONFIGS = {
    "alpha": glora.GLoRAConfig.lora(rank=2, alpha=6),
    "dropout": glora.GLoRAConfig.lora(rank=2, rank_dropout=0.5),
    "A": glora.GLoRAConfig.hira(rank=2),
    "A and B": glora.GLoRAConfig(A="vector", B="lora", C="none", D="none", E="none"),
    "vector": glora.GLoRAConfig(A="none", B="vector", C="none", D="none", E="none"),
    "E": glora.GLoRAConfig(A="none", B="lora", C="none", D="none", E="vector"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_is_anything_else_goes_the_general_way(name: str) -> None:
    layer, x = adapted(), torch.randn(2, 5)
    assert lone_lora(layer, x) is not None
    with torch.enable_grad():  # restores what a change sets
        CHANGES[name](layer)
        assert lone_lora(layer, x) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_anything_else_goes_the_general_way(name: str) -> None:
    assert lone_lora(adapted(config=CONFIGS[name]), torch.randn(2, 5)) is None


def test_merged_removed_or_routed_it_goes_the_general_way() -> None:
    layer, x = adapted(), torch.randn(2, 5)
    with glora.merged(layer):
        assert lone_lora(layer, x) is None
    with glora.route(layer, ["default", None]):
        assert lone_lora(layer, x) is None
    assert lone_lora(layer, x) is not None
    assert lone_lora(copy.deepcopy(layer), x) is not None


def test_inputs_that_are_anything_else_go_the_general_way() -> None:
    layer, x = adapted(), torch.randn(2, 5)
    for other in (x.double(), x.long(), x[:, :4], x.as_subclass(Own), torch.tensor(1.0)):
        assert lone_lora(layer, other) is None
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[:, :4])


def test_under_whatever_looks_at_operations_it_goes_the_general_way() -> None:
    layer, x = adapted(), torch.randn(2, 5)
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(lone_lora(layer, x) is None)
        return x.clone()

    with torch.autocast("cpu"):
        look(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        look(x)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        look(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what a trace keeps
        torch.jit.trace(look, x, check_trace=False)  # pyright: ignore
    y = layer(x)
    y.register_hook(look)
    y.sum().backward()
    assert seen == [True] * 7


@pytest.mark.parametrize("graded", [True, False])
def test_nested_inputs_go_the_general_way(graded: bool) -> None:
    layer, parts = adapted().train(graded), [torch.randn(2, 5), torch.randn(3, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that they are a prototype
        x = torch.nested.nested_tensor(parts)  # a plain Tensor by its type, which has no shape
    with torch.set_grad_enabled(graded):
        for found, part in zip(layer(x).unbind(), parts, strict=True):
            assert torch.allclose(found, layer(part), atol=1e-6)


@pytest.mark.parametrize("name", ["original", "left", "right", "bias"])
def test_tensors_held_elsewhere_go_the_general_way(name: str) -> None:
    # As replicas of DataParallel, modules that FullyShardedDataParallel has flattened, and pruned ones hold them.
    layer, x = adapted(), torch.randn(2, 5)
    expected = layer(x)
    holder = next(module for module in layer.modules() if module._parameters.get(name) is not None)
    setattr(holder, name, holder._parameters.pop(name).clone())  # pyright: ignore[reportOptionalMemberAccess]
    assert lone_lora(layer, x) is None
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_autocast_of_any_device_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    internals: Any = runpy.run_path(torch_internals.__file__)  # as where torch is built for all of them
    assert not internals["is_watched"]()
    torch.set_autocast_enabled(device, True)  # `torch.autocast` wants the device to be there
    try:
        assert internals["is_watched"]()
    finally:
        torch.set_autocast_enabled(device, False)


def test_a_bias_that_another_thread_adapts_meanwhile_is_not_lost() -> None:
    layer, x = adapted(), torch.randn(2, 5)
    expected = layer(x)

    class Interrupted(dict[str, Any]):
        """The dictionary of parametrizations, during whose look-up another thread attaches an adapter."""

        done = False

        def __len__(self) -> int:
            count = super().__len__()
            if not self.done:
                self.done = True
                glora.apply(
                    layer, config=glora.GLoRAConfig(A="none", B="none", C="none", D="none", E="vector"), name="E"
                )
                glora.activate(layer, {"default": 1})
            return count

    stacks = layer._modules["parametrizations"]
    assert stacks is not None
    stacks._modules = Interrupted(stacks._modules)
    assert torch.equal(layer(x), expected)
    assert "bias" in stacks._modules
