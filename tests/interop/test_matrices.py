"""Convolutions against LyCORIS's LoCon, and experts against PEFT's target_parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora import GLoRAConfig


def factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A matrix of this rank, or a batch of them, taken apart."""
    U, S, Vh = torch.linalg.svd(delta.double())
    assert S[..., rank:].abs().max() < 1e-6
    return (U[..., :rank] * S[..., None, :rank]).float(), Vh[..., :rank, :].float()


def test_a_low_rank_b_of_a_convolution_is_locon() -> None:
    lycoris = pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    module: Any = lycoris.LoConModule("locon", layer, 1.0, 2, 4)
    nn.init.normal_(module.lora_up.weight)
    delta = module.get_diff_weight(1.0)[0].detach().reshape(6, -1)
    x = torch.randn(2, 4, 5, 5)
    module.apply_to()
    expected = layer(x)
    module.restore()
    glora.apply(layer, lambda *_: True, GLoRAConfig.lora(rank=2))
    left, right = factors(delta, 2)
    glora.load_state_dict(layer, {"B.left": left, "B.right": right})
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_low_rank_b_of_experts_is_pefts_target_parameters() -> None:
    peft: Any = pytest.importorskip("peft")
    from benchmarks.families import families, inputs_of, output

    for family in ("Mixtral", "GPT-OSS"):
        build, kind = families()[family]
        torch.manual_seed(0)
        model, inputs = build().eval(), inputs_of(kind)
        theirs = peft.get_peft_model(
            build().eval(), peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
        )
        theirs.base_model.model.load_state_dict(model.state_dict(), strict=False)
        tensors: dict[str, Tensor] = {}
        for name, module in theirs.base_model.model.named_modules():
            if type(module).__name__ != "ParamWrapper":
                continue
            experts = module.get_base_layer()
            at = name.removesuffix(".base_layer")
            experts.load_state_dict(model.get_submodule(at).state_dict())
            nn.init.normal_(module.lora_B["default"].weight)
            delta = module.get_delta_weight("default").detach()
            delta = delta.mT if getattr(experts, "is_transposed", False) else delta
            left, right = factors(delta, 2)
            tensors |= {f"{at}.gate_up_proj.B.left": left, f"{at}.gate_up_proj.B.right": right}
        with torch.no_grad():
            expected = output(theirs, inputs)
            assert not torch.allclose(expected, output(model, inputs), atol=1e-3)
            glora.apply(model, ["gate_up_proj"], GLoRAConfig.lora(rank=2))
            glora.load_state_dict(model, tensors)
            assert torch.allclose(output(model, inputs), expected, atol=1e-4)
