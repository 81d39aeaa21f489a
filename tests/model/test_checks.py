"""What cannot be adapted or trained as a whole, and what is said of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import glora
from glora import GLoRAConfig
from tests.helpers import internals
from tests.helpers.calls import attach, refused, warned
from tests.helpers.models import Net, Pair, without_bias
from tests.helpers.state import unchanged


def lazy(model: Pair) -> None:
    model.bad = nn.LazyLinear(4)


def integers(model: Pair) -> None:
    model.bad.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def eight_bit_floats(model: Pair) -> None:
    model.bad.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)


def wrapped_tensor(model: Pair) -> None:
    """As torchao's quantised and DTensor's sharded weights are."""
    model.bad.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))


def weight_norm(model: Pair) -> None:
    parametrizations.weight_norm(model.bad)


def older_weight_norm(model: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.bad)


def older_spectral_norm(model: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model.bad)


def pruned_weight(model: Pair) -> None:
    prune.l1_unstructured(model.bad, "weight", amount=0.5)


def pruned_bias(model: Pair) -> None:
    prune.l1_unstructured(model.bad, "bias", amount=0.5)


UNFIT: dict[Callable[[Pair], None], str] = {
    lazy: "lazy.*run one batch",
    integers: "int8.*quantise with torchao.*float copy",
    eight_bit_floats: "float8.*quantise with torchao.*float copy",
    wrapped_tensor: "TwoTensor.*attach to a float copy",
    weight_norm: "parametrized by something else.*remove",
    older_weight_norm: "weight_norm.*undo",
    older_spectral_norm: "no parameter.*undo",
    pruned_weight: "pruning.*undo",
    pruned_bias: "prun.*undo",
}


@pytest.mark.parametrize("how", UNFIT)
@pytest.mark.parametrize(
    "targets", [["bad"], ["good", "bad"], {"bad": GLoRAConfig.glora()}], ids=["list", "two", "mapping"]
)
def test_an_unfit_layer_that_is_named_is_refused_with_what_to_do(targets: Any, how: Callable[[Pair], None]) -> None:
    model = Pair()
    how(model)
    refused(model, f"'bad' is not: .*{UNFIT[how]}", targets)


@pytest.mark.parametrize("how", UNFIT)
@pytest.mark.parametrize("targets", [".*", lambda *_: True, "all-linear"], ids=["regex", "predicate", "all-linear"])
def test_an_unfit_layer_that_is_swept_in_is_skipped_with_one_warning(targets: Any, how: Callable[[Pair], None]) -> None:
    model = Pair()
    how(model)
    (skipped,) = glora.plan(model, targets).skipped
    assert (skipped.path, internals.is_unsupported(skipped)) == ("bad", True)
    with unchanged(model.bad):
        (message,) = warned(lambda: glora.apply(model, targets, freeze=False))
    assert re.search(f"^1 of .*'bad'.*{UNFIT[how]}", message)
    assert {key.split(".")[0] for key in glora.state_dict(model)} == {"good"}


def test_a_warning_counts_all_unfit_layers_and_names_the_first_few() -> None:
    model = nn.Sequential(nn.Linear(4, 4), *(nn.LazyLinear(4) for _ in range(8)))
    (message,) = warned(lambda: glora.apply(model, config=glora.GLoRAConfig.glora()))
    assert re.search(r"^8 of .*'1': .*; and 3 more", message)
    assert len(glora.plan(model, name="second", config=glora.GLoRAConfig.glora()).skipped) == 8


def test_no_bias_is_created_in_place_of_a_pruned_one() -> None:
    model = Pair()
    pruned_bias(model)
    refused(model, "'bad' is not: .*prun", ["bad"], GLoRAConfig.glora(create_bias=True))


def test_only_unfit_layers_leave_nothing_to_train() -> None:
    refused(nn.Sequential(nn.LazyLinear(4)), "something to train.*'0'.*lazy")


def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was() -> None:
    model = without_bias()
    with unchanged(model), pytest.raises(UserWarning, match="create_bias=True"):
        glora.apply(model, config=glora.GLoRAConfig.glora())
    model = Pair()
    lazy(model)
    with unchanged(model), pytest.raises(UserWarning, match="lazy"):
        glora.apply(model, config=glora.GLoRAConfig.glora())


def test_a_head_that_is_tied_by_its_memory_alone_is_refused() -> None:
    model = Net()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    refused(model, "'head' is not: .*tied to embed.weight.*untie", ["q_proj"], trainable=["head"])
    refused(model, "'embed' is not: .*tied to head.weight.*untie", ["q_proj"], trainable=["embed"])


def test_a_parametrized_or_lazy_head_is_refused() -> None:
    model = Net()
    parametrizations.weight_norm(model.head)
    refused(model, "'head' is not: .*parametrized", ["q_proj"], trainable=["head"])
    model.head = nn.LazyLinear(10)
    refused(model, "'head' is not: .*lazy.*one batch", ["q_proj"], trainable=["head"])


DROPOUT = GLoRAConfig.glora(rank_dropout=0.5)


def test_a_head_in_a_dtype_in_which_nothing_trains_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.float8_e4m3fn))
    refused(model, "'1' is not: its weight is torch.float8_e4m3fn, .*float copy", ["0"], trainable=["1"])


class Keeps(nn.Linear):
    """Has its weight in a plain attribute too, and computes with that."""

    def __init__(self, how: str) -> None:
        super().__init__(4, 4)
        kept = {"list": [self.weight], "dict": {"w": [self.weight, 1]}, "itself": self.weight}[how]
        vars(self)["kept"] = kept

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        leaves = [*tree_leaves(vars(self)["kept"])]
        return nn.functional.linear(input, leaves[0], self.bias)


@pytest.mark.parametrize("how", ["list", "dict", "itself"])
def test_what_keeps_its_tensors_in_an_attribute_of_its_own_is_refused(how: str) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "keeps": Keeps(how)})
    why = "'keeps' is not: it has its weight in its attribute `kept` too"
    refused(model, why, ["linear"], trainable=["keeps"])
    refused(model, why, ["keeps"])


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


def test_rank_dropout_is_refused_where_a_forward_is_not_nn_linears() -> None:
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    for bad in (Own(4, 4), replaced):
        model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": bad})
        refused(model, "'bad' is not: its forward is its own", ["bad"], DROPOUT)
        attach(model, GLoRAConfig.glora(), targets=["bad"])  # without dropout it is adapted
        refused(model, "'bad' is not: its forward is its own", ["bad"], DROPOUT, name="b")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("out_features", "in_features"), [(0, 4), (4, 0), (0, 0)])
def test_an_empty_weight_is_refused(out_features: int, in_features: int) -> None:
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": nn.Linear(in_features, out_features)})
    refused(model, r"'bad' is not: its weight is empty", ["bad"])
    assert [layer.path for layer in glora.plan(model, config=glora.GLoRAConfig.glora()).layers] == ["good"]


def test_a_layer_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        made = nn.Linear(4, 4)
    model = nn.Sequential(made, nn.Linear(4, 4))
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="'0' is not: its weight was made in inference mode"):
        glora.apply(model, ["0"], config=glora.GLoRAConfig.glora())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_sparse_buffer_elsewhere_is_no_hindrance() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("graph", torch.eye(3).to_sparse())
    glora.merge(glora.apply(model, config=glora.GLoRAConfig.glora()))
