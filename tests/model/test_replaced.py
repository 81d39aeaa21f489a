"""Adapted modules that another was put in the place of are named by the calls that follow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import glora
from tests.helpers.calls import LORA, warned


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def set_output_embeddings(self, new: nn.Module) -> None:
        self.head = new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


def adapted() -> Net:
    for_all = glora.apply(Net(), ["body.0", "body.1", "head"], LORA, trainable=["norm"], name="a")
    return glora.apply(for_all, ["body.1"], LORA, name="b")


def replace_head(model: Net) -> None:
    model.head = nn.Linear(4, 5)


def replace_a_layer(model: Net) -> None:
    model.body[1] = nn.Linear(4, 4)


def replace_the_norm(model: Net) -> None:
    model.norm = nn.LayerNorm(4)


def replace_the_body(model: Net) -> None:
    model.body = nn.Sequential(nn.Linear(4, 4))


def set_the_output(model: Net) -> None:
    model.set_output_embeddings(nn.Linear(4, 3))


REPLACED: dict[str, tuple[Callable[[Net], None], str]] = {
    "head": (replace_head, r"\(head.B.left, head.B.right\)"),
    "set_output_embeddings": (set_the_output, r"\(head.B.left, head.B.right\)"),
    "layer": (replace_a_layer, r"\(body.1.B.left, body.1.B.right\)"),
    "norm": (replace_the_norm, r"\(norm.weight, norm.bias\)"),
    "body": (replace_the_body, r"\(body.0.B.left, body.0.B.right, body.1.B.left"),
}
CALLS: dict[str, Callable[[Net, Path], object]] = {
    "activate": lambda model, _: glora.activate(model, "a"),
    "disabled": lambda model, _: glora.disabled(model).__enter__(),
    "merged": lambda model, _: glora.merged(model).__enter__(),
    "save": lambda model, folder: glora.save(model, folder, "a"),
    "state_dict": lambda model, _: glora.state_dict(model, "a"),
    "apply": lambda model, _: glora.apply(model, ["body.0"], LORA, name="c"),
    "plan": lambda model, _: glora.plan(model, ["body.0"], LORA, name="c"),
    "merge": lambda model, _: glora.merge(glora.activate(model, dict.fromkeys(glora.adapters(model), 1.0))),
    "remove": lambda model, _: glora.remove(model),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", REPLACED)
def test_every_call_names_what_went(kind: str, call: str, tmp_path: Path) -> None:
    replace, keys = REPLACED[kind]
    for model in (adapted(), copy.deepcopy(adapted())):
        replace(model)
        with pytest.warns(UserWarning, match=rf"was replaced by another.*{keys}") as said:
            CALLS[call](model, tmp_path)
        (one, *_) = [each for each in said if "replaced" in str(each.message)]
        assert one.filename == __file__


def test_a_wrapper_of_a_model_and_a_model_around_one_know_too() -> None:
    for wrap in (nn.DataParallel, nn.ModuleList):
        model = adapted()
        outer = wrap(model) if wrap is nn.DataParallel else wrap([model])
        replace_head(model)
        with pytest.warns(UserWarning, match=r"head.B.left"):
            glora.activate(outer, "a")
    inner = Net()
    glora.apply(nn.DataParallel(inner), ["head"], LORA)
    replace_head(inner)
    with pytest.warns(UserWarning, match=r"\(head.B.left"):
        glora.remove(inner)


def test_what_is_reached_still_is_not_named() -> None:
    model = adapted()
    model.head = checkpoint_wrapper(model.head)
    model.body[1] = torch.compile(model.body[1], backend="eager")  # pyright: ignore
    assert warned(lambda: glora.activate(model, "a")) == []


def test_nothing_is_said_once_adapters_are_off_or_of_the_other_copy() -> None:
    model = adapted()
    replica = copy.deepcopy(model)
    replace_head(replica)
    assert warned(lambda: glora.activate(model, "a")) == []
    glora.remove(model)
    replace_head(model)
    assert warned(lambda: glora.apply(model, ["head"], LORA)) == []
    assert warned(lambda: glora.state_dict(model)) == []


def test_a_module_whose_adapters_torch_has_taken_off_may_be_replaced() -> None:
    model = glora.apply(Net(), ["body.0", "head"], LORA)
    nn.utils.parametrize.remove_parametrizations(model.head, "weight")
    replace_head(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        glora.state_dict(model)
