"""Methods of other libraries that would leave adapters behind: refused, and the model is as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from tests.helpers.calls import LORA, RANDOM
from tests.helpers.state import unchanged


class Words(nn.Module):
    """As transformers' models: its method gives the embedding other memory, and the output layer another module."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.tied = tied

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def resize_token_embeddings(self, size: int | None = None) -> nn.Module:
        if size is not None:
            self.embed.weight.data = torch.randn(size, 4)
            self.head = nn.Linear(4, size, bias=False)
            self.head.requires_grad_(False)
            if self.tied:
                self.head.weight = self.embed.weight
        return self.embed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


ON_EMBEDDINGS: list[tuple[bool, dict[str, Any]]] = [
    (True, {"targets": ["body"], "trainable": ["embed"]}),
    (True, {"targets": ["body"], "trainable": ["head"]}),
    (False, {"targets": ["body"], "trainable": ["embed"]}),
    (False, {"targets": ["body"], "trainable": ["head"]}),
    (False, {"targets": ["body", "head"]}),
    (False, {"targets": ["head"]}),
]


@pytest.mark.parametrize("place", ["itself", "part", "whole"])
@pytest.mark.parametrize(("tied", "arguments"), ON_EMBEDDINGS)
def test_embeddings_with_adapters_are_not_resized(tied: bool, arguments: dict[str, Any], place: str) -> None:
    words = Words(tied)
    model = nn.ModuleDict({"part": words}) if place == "part" else words
    glora.apply(model, config=glora.GLoRAConfig.lora(rank=1, init="random"), **arguments)
    replica = copy.deepcopy(words)
    with unchanged(model):
        for each in (words, replica):
            with pytest.raises(RuntimeError, match="resize_token_embeddings would leave adapters.*Nothing has changed"):
                each.resize_token_embeddings(9)
        with glora.disabled(model), pytest.raises(RuntimeError, match="on (embed|head)"):
            words.resize_token_embeddings(9)
        with glora.merged(model), pytest.raises(RuntimeError, match="on (embed|head)"):
            words.resize_token_embeddings(9)
    assert words.resize_token_embeddings() is words.embed  # which asks for it alone
    glora.remove(model)
    words.resize_token_embeddings(9)
    assert words(torch.tensor([8])).shape == (1, 9)
    assert "resize_token_embeddings" not in vars(words)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_without_adapters_are_resized_and_stay_frozen_for_as_long_as_the_rest(tied: bool) -> None:
    model = glora.apply(Words(tied), ["body"], RANDOM)
    model.resize_token_embeddings(9)
    assert model(torch.tensor([8])).shape == (1, 9)
    trained = {id(parameter) for parameter in glora.parameters(model)}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained
    glora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


class Attention(nn.Module):
    """As diffusers': one product in place of three."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(4, 4) for _ in range(4))
        self.fused_projections = False

    def fuse_projections(self) -> None:
        self.to_qkv = nn.Linear(4, 12)
        self.to_qkv.weight.data = torch.cat([part.weight.data for part in (self.to_q, self.to_k, self.to_v)])
        self.to_qkv.bias.data = torch.cat([part.bias.data for part in (self.to_q, self.to_k, self.to_v)])
        self.fused_projections = True

    def unfuse_projections(self) -> None:
        self.fused_projections = False

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(x).chunk(3, -1) if self.fused_projections else (self.to_q(x), self.to_k(x), self.to_v(x))
        return self.to_out(parts[0] * parts[1] + parts[2])


class Diffuser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = Attention(), nn.Linear(4, 4)

    def fuse_qkv_projections(self) -> None:
        self.attn.fuse_projections()

    def unfuse_qkv_projections(self) -> None:
        self.attn.unfuse_projections()

    def enable_layerwise_casting(self, storage_dtype: torch.dtype) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(storage_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x))


@pytest.mark.parametrize("target", ["to_q", "to_k", "to_v"])
def test_projections_with_adapters_are_not_fused_and_fused_ones_not_adapted(target: str) -> None:
    model = glora.apply(Diffuser(), [target], RANDOM)
    with unchanged(model):
        for call in (model.fuse_qkv_projections, model.attn.fuse_projections):
            with pytest.raises(RuntimeError, match=f"fuse.*_projections would leave adapters.*on (attn.)?{target}"):
                call()
    glora.remove(model).fuse_qkv_projections()
    with unchanged(model), pytest.raises(ValueError, match=rf"attn.{target} are not called.*unfuse_qkv_projections"):
        glora.apply(model, [target], RANDOM)
    glora.apply(model, ["to_qkv"], RANDOM)
    with pytest.raises(RuntimeError, match="unfuse_qkv_projections would leave adapters.*on attn.to_qkv"):
        model.unfuse_qkv_projections()
    glora.remove(model).unfuse_qkv_projections()
    with unchanged(model), pytest.raises(ValueError, match=r"attn.to_qkv are not called"):
        glora.apply(model, ["to_qkv"], RANDOM)
    glora.apply(model, [target], RANDOM)


def test_what_is_not_fused_may_have_adapters() -> None:
    model, x = glora.apply(Diffuser(), ["to_out", "out"], RANDOM), torch.randn(3, 4)
    y = model(x)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(x), y)


def test_factors_are_not_cast_to_eight_bits() -> None:
    model = glora.apply(Diffuser(), ["to_q"], LORA, trainable=["out"])
    with unchanged(model), pytest.raises(RuntimeError, match="enable_layerwise_casting would leave.*on attn.to_q"):
        model.enable_layerwise_casting(torch.float8_e4m3fn)
    for module in (model.attn.to_q, model.out):  # by diffusers' function, which takes module by module
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            with unchanged(model), pytest.raises(RuntimeError, match="was to be cast to torch.float8"):
                module.to(dtype)
    model.to(torch.bfloat16)
    assert {tensor.dtype for tensor in glora.state_dict(model).values()} == {torch.bfloat16}


def test_methods_are_the_classs_own_again_when_adapters_are_off() -> None:
    for finish in (glora.merge, glora.remove, lambda m: glora.delete(m, "default")):
        model = glora.apply(Diffuser(), ["to_q"], RANDOM)
        assert "fuse_projections" in vars(model.attn)
        finish(model)
        assert "fuse_projections" not in vars(model.attn)
        model.fuse_qkv_projections()
