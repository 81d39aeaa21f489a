"""Whatever is called inside `torch.inference_mode()` (an evaluation between two epochs): training goes on after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import RANDOM, attach, quiet, remove_with_torch
from tests.helpers.models import three_adapters


def within(context: Any, model: nn.Module) -> None:
    with context:
        model(torch.randn(2, 6))


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "activate": lambda model, _: glora.activate(model, "b"),
    "activate by weights": lambda model, _: glora.activate(model, {"c": 0.5}),
    "delete": lambda model, _: glora.delete(model, "c"),
    "apply": lambda model, _: attach(model, RANDOM, name="d", targets=["up"], trainable=["head"]),
    "apply with a created bias": lambda model, _: attach(
        model, glora.GLoRAConfig.glora(create_bias=True, init="random"), name="d"
    ),
    "load": lambda model, directory: glora.load(model, directory, "d"),
    "load_state_dict": lambda model, _: glora.load_state_dict(model, glora.state_dict(model, "b"), "b"),
    "reset_parameters": lambda model, _: glora.reset_parameters(model, "a"),
    "disabled": lambda model, _: within(glora.disabled(model), model),
    "merged": lambda model, _: within(glora.merged(model), model),
    "route": lambda model, _: within(glora.route(model, ["a", "b"]), model),
    "merge": lambda model, _: glora.merge(model),
    "remove": lambda model, _: glora.remove(model),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "torch's removal of a bias": lambda model, _: remove_with_torch(model.up, "bias", bake=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_inside_inference_mode_leaves_a_model_that_trains(
    call: Callable[[nn.Module, Path], object], tmp_path: Path
) -> None:
    glora.save(three_adapters(), tmp_path, "b")
    model = three_adapters()
    with torch.inference_mode(), quiet():
        call(model, tmp_path)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    adapters = list(glora.adapters(model))
    for name in adapters or [""]:
        if name:
            glora.activate(model, name)
        before = {key: tensor.detach().clone() for key, tensor in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model(torch.randn(5, 6, requires_grad=True)).square().sum().backward()
        optimizer.step()
        assert any(not torch.equal(tensor, before[key]) for key, tensor in model.named_parameters())
    with quiet():
        glora.merge(model)
    model(torch.randn(5, 6)).square().sum().backward()
