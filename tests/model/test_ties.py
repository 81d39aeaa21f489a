"""Layers that share memory with other modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from tests.helpers import internals
from tests.helpers.calls import LORA, chosen, refused, warned
from tests.helpers.models import ALL_OF_NET, Net, Pair


def tie_by_identity(model: Net) -> None:
    model.head.weight = model.embed.weight


def tie_by_storage(model: Net) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.detach())


def tie_by_overlap(model: Net) -> None:
    rows = torch.randn(15, 4, device=model.head.weight.device)
    model.embed.weight, model.head.weight = nn.Parameter(rows[:10]), nn.Parameter(rows[5:])


def tie_to_a_buffer(model: Net) -> None:
    model.embed = nn.Module()
    model.embed.register_buffer("weight", model.head.weight.detach()[2:])


TIES = [tie_by_identity, tie_by_storage, tie_by_overlap, tie_to_a_buffer]


def tied(how: Callable[[Net], None], device: str) -> Net:
    with torch.device(device):
        model = Net()
        how(model)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", TIES)
@pytest.mark.parametrize(
    "targets", [["head"], {"head": GLoRAConfig.glora()}, ["q_proj", "head"]], ids=["list", "mapping", "two"]
)
def test_a_tied_layer_that_is_named_is_refused(targets: Any, how: Callable[[Net], None], device: str) -> None:
    refused(tied(how, device), r"'head' is not: .*tied to embed\.weight.*untie", targets)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", TIES)
@pytest.mark.parametrize("targets", [".*", lambda *_: True, "all-linear"], ids=["regex", "predicate", "all-linear"])
def test_a_tied_layer_that_is_swept_in_is_skipped_with_one_warning(
    targets: Any, how: Callable[[Net], None], device: str
) -> None:
    model = tied(how, device)
    planned = glora.plan(model, targets)
    assert [layer.path for layer in planned.layers] == ALL_OF_NET[:4]
    (skipped,) = planned.skipped
    assert (skipped.path, internals.is_unsupported(skipped)) == ("head", True)
    assert re.search(r"tied to embed\.weight.*untie", skipped.reason)
    assert skipped.reason in str(planned)
    weight = model.head.weight
    (message,) = warned(lambda: glora.apply(model, targets))
    assert re.search(r"^1 of .*'head'.*tied to embed\.weight.*untie", message)
    assert model.head.weight is weight
    assert not any(key.startswith("head") for key in glora.state_dict(model))


def test_a_tied_bias_is_found() -> None:
    model = Pair()
    model.bad.bias = model.good.bias
    refused(model, "'bad' is not: its bias is tied to good.bias", ["bad"], glora.GLoRAConfig.glora())


def test_a_tie_among_the_targets_skips_all_that_are_tied() -> None:
    model = Net()
    model.layers[0].k_proj.weight = model.layers[1].k_proj.weight = model.layers[0].q_proj.weight
    (message,) = warned(lambda: glora.apply(model, "all-linear", LORA))
    assert message.startswith("3 of ")
    assert {key.rpartition(".B")[0] for key in glora.state_dict(model)} == {"layers.1.q_proj", "head"}


def test_a_tied_layer_that_is_excluded_needs_no_word() -> None:
    model = tied(tie_by_identity, "cpu")
    assert (
        warned(lambda: glora.apply(model, ["q_proj", "head"], exclude=["head"], config=glora.GLoRAConfig.glora())) == []
    )
    model = tied(tie_by_identity, "cpu")
    assert warned(lambda: glora.apply(model, exclude=["head"], config=glora.GLoRAConfig.glora())) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_disjoint_views_of_one_storage_are_not_tied(device: str) -> None:
    model, fused = Pair(), torch.randn(8, 8, device=device)
    model.good.weight, model.bad.weight = nn.Parameter(fused[:4]), nn.Parameter(fused[4:, :4])
    assert chosen(model) == ["good", "bad"]
    assert chosen(model, ["good", "bad"]) == ["good", "bad"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "views",
    [
        lambda fused: (fused[:4, :4], fused[:4, 4:]),
        lambda fused: (fused[::2, :4], fused[1::2, :4]),
    ],
    ids=["columns", "every other row"],
)
def test_interleaved_views_of_one_storage_count_as_tied(
    views: Callable[[Tensor], tuple[Tensor, Tensor]], device: str
) -> None:
    model = Pair()
    good, bad = views(torch.randn(8, 8, device=device))
    model.good.weight, model.bad.weight = nn.Parameter(good), nn.Parameter(bad)
    refused(model, r"'bad' is not: .*tied to good\.weight.*untie", ["bad"])
    refused(model, "something to train.*tied")


def test_a_tie_is_still_seen_under_an_adapter_that_is_attached() -> None:
    model = Net()
    glora.apply(model, ["head"], LORA)
    model.embed.weight = nn.Parameter(model.head.parametrizations.weight.original.detach())
    refused(model, r"'head' is not: .*tied to embed\.weight", ["head"], LORA, name="second")
