"""Trained from equal tensors, glora and PEFT's GLoRA go the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.peers import net

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

STEPS, X, Y = 50, torch.randn(32, 6, generator=torch.Generator().manual_seed(3)), torch.arange(32) % 3


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(X)


@pytest.mark.parametrize("form", ["lora", "vector", "constant"])
def test_fifty_steps_have_the_losses_of_peft(form: str, tmp_path: Path) -> None:
    config = peft.GloraConfig(r=2, target_modules=["q", "k"], config_A_B=form, config_C="vector", config_D_E="vector")
    torch.manual_seed(1)
    theirs = peft.get_peft_model(net(), config)
    theirs.save_pretrained(tmp_path)
    ours = interop.load_peft(net(), tmp_path)
    first, second = train(theirs), train(ours)
    torch.testing.assert_close(second, first, atol=1e-4, rtol=0)
    assert first[-1] < first[0] - 0.05
    torch.testing.assert_close(logits(glora.merge(ours)), logits(theirs.merge_and_unload()), atol=1e-4, rtol=0)
