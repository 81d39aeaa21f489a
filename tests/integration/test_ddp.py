"""DistributedDataParallel: the same training as in one process, and no adapter that trains apart on each rank."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import glora
from tests.helpers.calls import RANDOM
from tests.helpers.models import adapted_block, block
from tests.helpers.ranks import differences, on_two_ranks

pytestmark = pytest.mark.integration


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator) for _ in range(3)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None) -> None:
    """A few steps on all of the data, or on this rank's half of it."""
    for batch in batches():
        optimizer.zero_grad()
        model(batch if rank is None else batch.chunk(2)[rank]).square().mean().backward()
        optimizer.step()


def equal_to_one_process(rank: int) -> None:
    for how in ("plain", "zero", "compiled"):
        model = adapted_block(trainable=["2"])
        alone = copy.deepcopy(model)
        train(alone, torch.optim.Adam(glora.parameters(alone), lr=0.01), None)
        # The default looks for no unused parameters: each one has a gradient.
        wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager") if how == "compiled" else model)
        if how == "zero":
            optimizer = ZeroRedundancyOptimizer(glora.parameters(wrapped), torch.optim.Adam, lr=0.01)
        else:
            optimizer = torch.optim.Adam(glora.parameters(wrapped), lr=0.01)
        train(wrapped, optimizer, rank)
        assert differences(list(glora.parameters(wrapped))) == 0.0
        found, expected = glora.state_dict(wrapped), glora.state_dict(alone)
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_training_equals_that_in_one_process_also_with_zero_and_compiled() -> None:
    on_two_ranks(equal_to_one_process)


def activated_after_wrapping(rank: int) -> None:
    x = batches()[0]
    for late in ("activated", "attached", "compiled"):
        model = adapted_block(name="a")
        if late != "attached":
            glora.apply(model, config=RANDOM, name="b")
            glora.activate(model, "a")
        wrapped = DistributedDataParallel(model)
        wrapped(x).sum().backward()
        if late == "attached":
            glora.apply(model, config=RANDOM, name="b")
        else:
            for _ in range(3):  # in turn, without training: each parameter is watched once
                glora.activate(model, "a")
                glora.activate(wrapped, "b")
            assert all(len(p._backward_hooks or ()) <= 1 for p in glora.parameters(model, "b"))
        forward = torch.compile(wrapped, backend="aot_eager") if late == "compiled" else wrapped
        with torch.no_grad():
            forward(x)  # to serve it is right
        with pytest.raises(RuntimeError, match="activated later has got a gradient.*Wrap the model again"):
            forward(x).sum().backward()
        # What the message says, with the old wrapper still there.
        again = DistributedDataParallel(wrapped.module)
        model.zero_grad()
        train(again, torch.optim.SGD(glora.parameters(again, "b"), lr=0.1), rank)
        assert differences(list(glora.parameters(model, "b"))) == 0.0
        assert not any(p._backward_hooks for p in glora.parameters(model, "b"))
        # What was synchronised from the start may come back.
        glora.activate(wrapped, "a")
        if late != "attached":
            del again
            glora.activate(model, "a")
            train(wrapped, torch.optim.SGD(glora.parameters(model, "a"), lr=0.1), rank)
            assert differences(list(glora.parameters(model, "a"))) == 0.0
        dist.barrier()


def test_an_adapter_that_is_activated_after_wrapping_is_refused_at_its_first_gradient() -> None:
    on_two_ranks(activated_after_wrapping)


def extracted_after_wrapping(_: int) -> None:
    x, model = batches()[0], block()
    wrapped = DistributedDataParallel(glora.search.supernet(model, "all-linear", glora.search.Space()))
    glora.search.extract(model, {"0": glora.GLoRAConfig.lora(rank=2)})
    with pytest.raises(RuntimeError, match="Wrap the model again"):
        wrapped(x).sum().backward()


def test_an_adapter_that_is_extracted_after_wrapping_is_refused_at_its_first_gradient() -> None:
    on_two_ranks(extracted_after_wrapping)
