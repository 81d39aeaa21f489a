"""diffusers' own calls on an adapted UNet and on a text encoder: right, or refused by name before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from tests.helpers.calls import RANDOM, quiet
from tests.helpers.state import clones, same

pytestmark = pytest.mark.integration
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return made.eval()


def call(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    return model(x, 3, context).sample


def adapted(unet: Any, **arguments: Any) -> Any:
    with quiet():
        return glora.apply(copy.deepcopy(unet), TARGETS, RANDOM, **arguments)


def test_projections_are_fused_before_or_not_at_all(unet: Any) -> None:
    model = adapted(unet)
    y, state = call(model), clones(model.state_dict())
    with pytest.raises(RuntimeError, match=r"fuse_qkv_projections would leave adapters.*attn1.to_q"):
        model.fuse_qkv_projections()
    assert same(model.state_dict(), state)
    torch.testing.assert_close(call(model), y)
    call(model).square().mean().backward()
    assert all(parameter.grad is not None for parameter in glora.parameters(model))
    fused = copy.deepcopy(unet)
    fused.fuse_qkv_projections()
    with quiet(), pytest.raises(ValueError, match=r"to_q.*are not called"):
        glora.apply(fused, ["to_q"], RANDOM)
    with quiet():
        glora.apply(fused, ["to_qkv", "to_kv", "attn2.to_q"], RANDOM)
    call(fused).square().mean().backward()
    assert all(parameter.grad is not None for parameter in glora.parameters(fused))
    glora.remove(fused).unfuse_qkv_projections()
    with quiet():
        glora.apply(fused, TARGETS, RANDOM)
    call(fused).square().mean().backward()
    assert all(parameter.grad is not None for parameter in glora.parameters(fused))


def test_factors_are_never_stored_in_eight_bits(unet: Any) -> None:
    model = adapted(unet)
    state = clones(model.state_dict())
    with pytest.raises(RuntimeError, match="enable_layerwise_casting would leave adapters"):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert same(model.state_dict(), state)
    with pytest.raises(RuntimeError, match=r"was to be cast to torch.float8"):
        diffusers.hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    assert {tensor.dtype for tensor in glora.state_dict(model).values()} == {torch.float32}
    cast = copy.deepcopy(unet)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="its weight is torch.float8_e4m3fn"):
        glora.apply(cast, ["to_q"], RANDOM)


def test_training_with_checkpointing_and_other_processors(unet: Any) -> None:
    gradients: list[list[Tensor | None]] = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = adapted(unet).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        call(model).square().mean().backward()
        gradients.append([parameter.grad for parameter in glora.parameters(model)])
    torch.testing.assert_close(*gradients)
    model = adapted(unet)
    y = call(model)
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    torch.testing.assert_close(call(model), y, rtol=1e-4, atol=1e-5)


def test_what_is_merged_is_saved_and_the_adapter_alone(unet: Any, tmp_path: Path) -> None:
    model = adapted(unet, trainable=["conv_out"])
    y = call(model)
    with pytest.raises(RuntimeError, match="plain keys"):
        model.save_pretrained(tmp_path / "no")
    with glora.merged(model):
        model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        call(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged").eval()), y, rtol=1e-4, atol=1e-5
    )
    glora.save(model, tmp_path / "adapter")
    torch.testing.assert_close(call(glora.load(copy.deepcopy(unet), tmp_path / "adapter", strict=True)), y)


def texts() -> Iterator[Any]:
    torch.manual_seed(0)
    yield transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    ).eval()


def test_a_text_encoder_takes_new_words_before_it_is_adapted() -> None:
    (encoder,) = texts()
    glora.apply(encoder, ["q_proj"], RANDOM, trainable=["token_embedding"])
    with pytest.raises(RuntimeError, match="resize_token_embeddings would leave adapters.*token_embedding"):
        encoder.resize_token_embeddings(103)
    glora.remove(encoder)
    encoder.resize_token_embeddings(103, mean_resizing=False)
    glora.apply(encoder, ["q_proj"], RANDOM, trainable=["token_embedding"])
    encoder(torch.tensor([[5, 102, 2]])).last_hidden_state.sum().backward()
    (words,) = [p for key, p in glora.named_parameters(encoder) if key.endswith("token_embedding.weight")]
    assert isinstance(words, nn.Parameter)
    assert words.shape == (103, 32)
    assert words.grad is not None
    assert words.grad[102].abs().sum() > 0
