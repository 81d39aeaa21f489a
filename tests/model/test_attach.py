"""Attaching: what it costs, meta models, training, and that removal leaves nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers import internals
from tests.helpers.calls import RANDOM
from tests.helpers.models import TOKENS, adapted_block, attached, block, build, in_states
from tests.helpers.state import same_outputs, snapshot


def test_functions_on_a_model_return_it() -> None:
    layer = nn.Linear(3, 3)
    assert glora.apply(layer, config=glora.GLoRAConfig.glora()) is layer
    assert glora.activate(layer, "default") is layer
    assert glora.load_state_dict(layer, glora.state_dict(layer)) is layer
    assert glora.reset_parameters(layer) is layer
    with glora.disabled(layer) as inside:
        assert inside is layer
    with glora.merged(layer) as inside:
        assert inside is layer
    assert glora.remove(layer) is layer
    assert glora.merge(layer) is layer


def test_attaching_computes_no_weight() -> None:
    with internals.computed_updates() as computed:
        adapted_block()
    assert not computed


def test_a_thousand_layers_attach_in_under_two_seconds() -> None:
    # In a process of its own, which coverage does not trace; best of three in processor time, to ignore other load.
    script = """
import time, torch, glora
torch.set_num_threads(1)
def seconds():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(1000)))
    start = time.process_time()
    glora.apply(model)
    return time.process_time() - start
print(min(seconds() for _ in range(3)))
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean)
    assert float(result.stdout) < 2.0


def test_meta_models_attach_fill_and_reset() -> None:
    with torch.device("meta"):
        model = block()
    glora.apply(model, config=RANDOM, trainable=["2"])
    assert all(value.is_meta for value in model.state_dict().values())
    with glora.merged(model):
        pass
    model.to_empty(device="cpu")
    plain = block()
    model.load_state_dict(plain.state_dict(), strict=True)
    glora.reset_parameters(model)
    x = torch.randn(3, 6)
    assert not torch.allclose(model(x), plain(x))
    assert torch.equal(model[2].weight, plain[2].weight)  # the head starts from the base
    assert glora.adapters(model) == {"default": 1.0}
    glora.remove(model)
    assert same_outputs(model(x), plain(x))


def test_training_lowers_the_loss_and_merges() -> None:
    model, x = block(), torch.randn(32, 6)
    target = torch.randn(32, 6)
    glora.apply(model, config=glora.GLoRAConfig.glora(rank=2))
    optimizer = torch.optim.AdamW(glora.parameters(model), lr=0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    y = model(x)
    glora.merge(model)
    torch.testing.assert_close(model(x), y)


@attached
@in_states
def test_a_while_merged_or_disabled_leaves_no_trace_after_remove(
    how: Callable[[nn.Module], object], state: Callable[[nn.Module], AbstractContextManager[object]]
) -> None:
    model = build()
    before = snapshot(model)
    how(model)
    within = snapshot(model)
    with state(model):
        model(TOKENS)
    assert snapshot(model) == within
    glora.remove(model)
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("config", [RANDOM, glora.GLoRAConfig.lora(init="random")])
def test_strided_nested_tensors_go_through_as_through_a_plain_layer(config: glora.GLoRAConfig) -> None:
    layer = glora.apply(nn.Linear(4, 3), config=config)
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    found = layer(torch.nested.nested_tensor(parts))
    for y, part in zip(found.unbind(), parts, strict=True):
        torch.testing.assert_close(y, layer(part))


@given(rank=st.integers(1, 70), out=st.integers(1, 66), inputs=st.integers(1, 66))
def test_a_rank_above_both_sizes_of_a_layer_warns(rank: int, out: int, inputs: int) -> None:
    model = nn.Sequential(nn.Linear(inputs, out), nn.Linear(out, 80))
    wide = rank > max(8, out, inputs)
    with pytest.warns(UserWarning, match=r"needs a rank below.*\(0\)") if wide else contextlib.nullcontext():
        glora.apply(model, config=glora.GLoRAConfig.lora(rank=rank))
    glora.apply(nn.Linear(2, 2), config=glora.GLoRAConfig.ssf(rank=rank))  # no product, no rank
