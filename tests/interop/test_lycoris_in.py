"""What LyCORIS's modules compute on drawn layers, and what their files compute in glora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from safetensors.torch import save_file
from torch import nn

import glora
from glora import interop

pytest.importorskip("lycoris", reason="the extra `interop` brings it")

from tests.helpers.lycoris import Case, cases, error_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

DORA = {"weight_decompose": True}


@given(cases())
@example(Case("lora", "conv2d 3x3", (3, 4), 2, 1.0, True, 0, {"use_tucker": True}))
@example(Case("lora", "conv2d 3x3", (3, 4), 2, 1.0, True, 0, {**DORA, "wd_on_out": False}))
@example(Case("lora", "linear", (3, 4), 2, 1.0, True, 0, {**DORA, "wd_on_out": False}))
@example(Case("lora", "grouped", (3, 4), 2, 1.0, True, 0, {**DORA, "wd_on_out": False}))
@example(Case("loha", "conv2d 3x3", (8, 9), 2, 1.0, True, 0, {"use_tucker": True, **DORA}))
@example(Case("lokr", "conv2d 3x3", (12, 12), 1, 2.5, True, 0, {"use_tucker": True}))
@example(Case("lokr", "linear", (12, 12), 1, 2.5, True, 0, {"decompose_both": True}))
@example(Case("glora", "conv2d 3x3", (2, 4), 4, 2.5, True, 0))
@example(Case("full", "conv2d 3x3", (2, 4), 4, 2.5, True, 0))
@example(Case("ia3", "conv2d 3x3", (2, 4), 4, 2.5, True, 0, {"train_on_input": True}))
def test_a_file_computes_what_lycoris_computes_forward_and_merged(tmp_path_factory: Any, case: Case) -> None:
    file = tmp_path_factory.mktemp("lycoris") / "a.safetensors"
    save_file(case.tensors(), file)
    model, x = case.model(), case.input()
    layer = model.in_blocks[0]
    base, weight = layer(x).detach(), layer.weight.detach().clone()
    assert interop.load_lycoris(model, file) is model
    error_of(layer(x).detach(), case.forward(), base)
    error_of(layer.weight.detach(), case.merged(), weight)
    glora.merge(model)
    error_of(model.in_blocks[0](x).detach(), case.forward(), base)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_full_difference_has_the_rank_that_it_has(rank: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for shape, layer in (((40, 30), nn.Linear(30, 40)), ((6, 4, 3, 3), nn.Conv2d(4, 6, 3))):
        rows = torch.randn(shape[0], rank) @ torch.randn(rank, layer.weight[0].numel())
        save_file({"lora_unet_0.diff": rows.reshape(shape)}, tmp_path / "a.safetensors")
        model, base = nn.Sequential(layer), layer.weight.detach().clone()
        interop.load_lycoris(model, tmp_path / "a.safetensors")
        assert glora.state_dict(model)["0.B.left"].shape == (shape[0], rank)
        error_of(model[0].weight.detach(), base + rows.reshape(shape), base)


def test_a_difference_of_zero_is_a_b_of_zero(tmp_path: Path) -> None:
    save_file({"x_0.diff": torch.zeros(3, 2), "x_0.diff_b": torch.ones(3)}, tmp_path / "a.safetensors")
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    x = torch.randn(4, 2)
    expected = model(x) + 1
    torch.testing.assert_close(interop.load_lycoris(model, tmp_path / "a.safetensors")(x), expected)


@pytest.mark.parametrize("names", [("w_norm", "b_norm"), ("diff", "diff_b")])
def test_trained_norms_are_heads(names: tuple[str, str], tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6)), torch.randn(5, 4)
    base = model(x).detach()
    changes = {f"lora_unet_{n}.{name}": torch.randn(6) for n in (1, 2) for name in names}
    save_file(changes, tmp_path / "a.safetensors")
    expected = nn.functional.layer_norm(
        model[0](x), (6,), *(changes[f"lora_unet_1.{n}"] + p for n, p in zip(names, (1, 0), strict=True))
    )
    expected = nn.functional.group_norm(
        expected, 2, *(changes[f"lora_unet_2.{n}"] + p for n, p in zip(names, (1, 0), strict=True))
    )
    interop.load_lycoris(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model(x), expected)
    with glora.disabled(model):
        assert torch.equal(model(x), base)


def test_an_alpha_that_is_not_there_or_0_is_the_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(3, 2), torch.randn(2, 4)
    for alpha in ({}, {"a_0.alpha": torch.tensor(0.0)}, {"a_0.alpha": torch.tensor(2)}):
        model = nn.Sequential(nn.Linear(4, 3))
        expected = model[0].weight.detach() + up @ down
        save_file({"a_0.lora_up.weight": up, "a_0.lora_down.weight": down, **alpha}, tmp_path / "a.safetensors")
        interop.load_lycoris(model, tmp_path / "a.safetensors")
        torch.testing.assert_close(model[0].weight, expected)


def test_a_linear_layers_factors_may_have_the_axes_of_a_1x1_convolution_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(3, 2), torch.randn(2, 4)
    for layer, ones in ((nn.Linear(4, 3), (1, 1)), (nn.Conv2d(4, 3, 1), ())):
        file, base = tmp_path / "a.safetensors", layer.weight.detach().clone()
        save_file(
            {"a_0.lora_up.weight": up.reshape(3, 2, *ones), "a_0.lora_down.weight": down.reshape(2, 4, *ones)}, file
        )
        interop.load_lycoris(nn.Sequential(layer), file)
        torch.testing.assert_close(layer.weight, base + (up @ down).reshape(base.shape))


def test_a_batch_norm_keeps_its_own_buffers_dtypes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3).half())
    save_file({"x_0.diff": torch.ones(3, dtype=torch.float16)}, tmp_path / "a.safetensors")
    interop.load_lycoris(model, tmp_path / "a.safetensors")
    assert torch.equal(model[0].weight, torch.full((3,), 2.0).to(model[0].weight))
    assert model[0].num_batches_tracked.dtype == torch.int64


def test_what_must_be_computed_beside_the_base_is_so_with_another_adapter_attached(tmp_path: Path) -> None:
    case = Case("lora", "conv2d 3x3", (3, 4), 2, 1.0, True, 0, DORA)
    save_file(case.tensors(), tmp_path / "a.safetensors")
    model, base = case.model(), case.model().in_blocks[0](case.input()).detach()
    glora.apply(model, ["in_blocks.0"], glora.GLoRAConfig.lora(init="random"), name="first")
    interop.load_lycoris(model, tmp_path / "a.safetensors", "second")
    error_of(model.in_blocks[0](case.input()).detach(), case.forward(), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "glora", "ia3", "full"])
def test_files_of_half_precision_and_bases_too(dtype: torch.dtype, algorithm: str, tmp_path: Path) -> None:
    options = DORA if algorithm in ("lora", "loha", "lokr") else {}
    case = Case(algorithm, "conv2d 3x3", (3, 4), 2, 1.0, True, 0, options)
    whole = {key: tensor.to(dtype).float() for key, tensor in case.tensors().items()}
    save_file(whole, tmp_path / "whole.safetensors")
    save_file({k: t.to(dtype) if t.is_floating_point() else t for k, t in whole.items()}, tmp_path / "half.safetensors")
    expected = interop.load_lycoris(case.model(), tmp_path / "whole.safetensors").in_blocks[0].weight.detach()
    half = interop.load_lycoris(case.model(), tmp_path / "half.safetensors").in_blocks[0].weight.detach()
    error_of(half, expected, case.model().in_blocks[0].weight.detach())
    model = interop.load_lycoris(case.model().to(dtype), tmp_path / "half.safetensors")
    torch.testing.assert_close(model.in_blocks[0].weight.float(), expected, atol=0.02, rtol=0.02)
