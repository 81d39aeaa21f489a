"""What save_lycoris writes: LyCORIS computes it, and what LyCORIS wrote goes back to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.calls import only

pytest.importorskip("lycoris", reason="the extra `interop` brings it")

from tests.helpers.lycoris import LAYERS, Case, cases, error_of, module_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

PLAIN = {"use_tucker": False, "weight_decompose": False}


@given(cases(["lora", "glora", "ia3"]), st.sampled_from(["lycoris", "lora_unet", "lora_te1"]))
@example(Case("glora", "conv2d 3x3", (2, 4), 4, 2.5, True, 0), "lora_unet")
@example(Case("glora", "conv2d 1x1", (2, 4), 4, 2.5, True, 0), "lora_unet")
def test_what_lycoris_wrote_goes_back_to_the_bit(tmp_path_factory: Any, case: Case, prefix: str) -> None:
    case = replace(case, options=case.options | (PLAIN if case.algorithm == "lora" else {}))
    sizes = case.model().in_blocks[0].weight.shape[:2]
    # Factors of a convolution of a rank above its channels, of inputs or outputs, are read at their number.
    assume(case.algorithm != "glora" or case.rank <= min(sizes) or case.layer in ("linear", "conv2d 1x1"))
    folder, tensors = tmp_path_factory.mktemp("lycoris"), case.tensors(prefix)
    save_file(tensors, folder / "theirs.safetensors")
    model = interop.load_lycoris(case.model(), folder / "theirs.safetensors")
    interop.save_lycoris(model, folder / "ours.safetensors", prefix=prefix)
    again = load_file(folder / "ours.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        if key.endswith("alpha"):
            assert again[key].item() == pytest.approx(float(tensor), rel=1e-6)
        else:
            assert torch.equal(again[key], tensor), key


@st.composite
def written(draw: st.DrawFn, forms: str) -> tuple[nn.Module, dict[str, Any]]:
    kind = draw(st.sampled_from(list(LAYERS)))
    layer = LAYERS[kind](draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.booleans()))
    product = "matmul" if forms != "B" else "hadamard"
    if forms in ("scale", "dora"):
        product = draw(st.sampled_from(["hadamard", "matmul"] if kind == "linear" else ["hadamard"]))
        config = only(A="vector") if forms == "scale" else only(A="vector", B="lora")
        return layer, {"config": config, "product": product, "rank": 2, "alpha": 3.0}
    config = only(**dict.fromkeys(forms, "lora"))
    return layer, {
        "config": config,
        "product": product,
        "rank": draw(st.integers(1, 4)),
        "alpha": draw(st.sampled_from([None, 0.5, 3.0])),
    }


def as_lycoris_reads(parts: dict[str, Tensor], layer: nn.Module) -> Tensor:
    """W' of a layer, by LyCORIS's own reading of its tensors."""
    if "on_input" in parts:  # its constructor from a file asks for another number of tensors than it gives
        module = module_of("ia3")("x", layer, train_on_input=bool(parts["on_input"]))
    elif "a1.weight" in parts:
        module = module_of("glora")("x", layer, lora_dim=len(parts["a2.weight"]), alpha=float(parts["alpha"]))
    else:
        magnitude = parts.get("dora_scale", torch.ones(2, 1))
        on_outputs = magnitude.shape[:2] == (layer.weight.shape[0], 1)
        options = {"weight_decompose": "dora_scale" in parts, "wd_on_out": on_outputs}
        rank, alpha = len(parts["lora_down.weight"]), float(parts["alpha"])
        module = module_of("lora")("x", layer, lora_dim=rank, alpha=alpha, **options)
    module.load_state_dict(parts)
    return module.get_merged_weight()[0].detach()


@torch.no_grad()
@pytest.mark.parametrize("forms", ["B", "A", "AB", "scale", "dora"])
@given(data=st.data(), seed=st.integers(0, 99))
def test_lycoris_computes_what_was_saved(tmp_path_factory: Any, forms: str, data: st.DataObject, seed: int) -> None:
    layer, options = data.draw(written(forms))
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        parameter.normal_()
    file, base = tmp_path_factory.mktemp("lycoris") / "a.safetensors", layer.weight.detach().clone()
    model = nn.Sequential(layer)
    config = replace(options.pop("config"), **options, init="random")
    glora.apply(model, ["0"], config)
    interop.save_lycoris(model, file, prefix="lora_unet")
    mine, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    glora.remove(model)
    tensors = load_file(file)
    parts = {key.partition(".")[2]: tensor for key, tensor in tensors.items()}
    if getattr(layer, "groups", 1) == 1 or "lora_up.weight" in parts:  # whose A and IA3 LyCORIS sizes by all groups
        error_of(mine, as_lycoris_reads(parts, layer), base)
    interop.load_lycoris(model, file, strict=True)
    error_of(layer.weight.detach(), mine, base)
    assert bias is None or torch.equal(layer.bias.detach(), bias)


def test_a_b_of_more_components_than_a_has_is_written_whole(tmp_path: Path) -> None:
    case = Case("glora", "conv2d 3x3", (4, 5), 2, 2.5, True, 0)
    save_file(case.tensors(), tmp_path / "theirs.safetensors")
    model, base = interop.load_lycoris(case.model(), tmp_path / "theirs.safetensors"), case.model().in_blocks[0].weight
    tensors = glora.state_dict(model)
    for key in ("left", "right"):
        tensors[f"in_blocks.0.B.{key}"].normal_()
    mine = model.in_blocks[0].weight.detach().clone()
    interop.save_lycoris(model, tmp_path / "ours.safetensors")
    again = interop.load_lycoris(case.model(), tmp_path / "ours.safetensors")
    error_of(again.in_blocks[0].weight.detach(), mine, base.detach())


@given(cases(["lora", "loha", "lokr"]))
def test_doras_go_back(tmp_path_factory: Any, case: Case) -> None:
    case = replace(case, options=case.options | {"weight_decompose": True})
    folder = tmp_path_factory.mktemp("lycoris")
    save_file(case.tensors(), folder / "theirs.safetensors")
    model = interop.load_lycoris(case.model(), folder / "theirs.safetensors")
    mine, base = model.in_blocks[0].weight.detach().clone(), case.model().in_blocks[0].weight.detach()
    interop.save_lycoris(model, folder / "ours.safetensors")
    again = interop.load_lycoris(case.model(), folder / "ours.safetensors")
    error_of(again.in_blocks[0].weight.detach(), mine, base)


def test_a_dora_that_loses_w0_is_refused(tmp_path: Path) -> None:
    model = glora.apply(nn.Sequential(nn.Linear(3, 4)), config=only(A="vector", B="lora"))
    with torch.no_grad():
        glora.state_dict(model)["0.A.value"][0] = -1
    with pytest.raises(ValueError, match="W0 is lost"):
        interop.save_lycoris(model, tmp_path / "a.safetensors")


def test_an_a_of_a_convolution_beyond_its_channels_is_written_beside_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    base = model[0].weight.detach().clone()
    glora.apply(model, ["0"], replace(only(A="lora", B="lora"), product="matmul", rank=2, alpha=3, init="random"))
    mine = model[0].weight.detach().clone()
    interop.save_lycoris(model, tmp_path / "a.safetensors")
    keys = {key.partition(".")[2] for key in load_file(tmp_path / "a.safetensors")}
    assert keys == {"lora_up.weight", "lora_down.weight", "alpha"}
    interop.load_lycoris(glora.remove(model), tmp_path / "a.safetensors", strict=True)
    error_of(model[0].weight.detach(), mine, base)


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (nn.Linear(3, 4), glora.GLoRAConfig.hira(rank=2), "product='hadamard'"),
        (nn.Linear(3, 4), glora.GLoRAConfig.ia3(), "'0' has D=vector"),
        (
            nn.Linear(3, 4),
            glora.GLoRAConfig(A="constant", B="lora", C="none", D="none", E="none"),
            "'0' has A=constant",
        ),
        (nn.Linear(3, 4), glora.GLoRAConfig.bitfit(), "'0' has E=vector"),
        (nn.MultiheadAttention(4, 2), glora.GLoRAConfig.lora(rank=2), "in_proj_weight' is no"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(
    layer: nn.Module, config: Any, message: str, tmp_path: Path
) -> None:
    target = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "0"
    model = glora.apply(nn.Sequential(layer), [target], config)
    with pytest.raises(ValueError, match=f"nothing was.*{message}"):
        interop.save_lycoris(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"nothing was.*{message}"):
        interop.save_lycoris(
            {
                "lora_unet": model,
                "lora_te": glora.apply(nn.Sequential(nn.Linear(2, 2)), config=glora.GLoRAConfig.lora()),
            },
            tmp_path / "a.safetensors",
        )
    assert not (tmp_path / "a.safetensors").exists()


def test_a_file_of_several_models_knows_each_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {"lora_unet": nn.Sequential(nn.Linear(3, 4)), "lora_te": nn.Sequential(nn.Linear(3, 4))}
    for model in models.values():
        glora.apply(model, config=glora.GLoRAConfig.lora(init="random"))
    interop.save_lycoris(models, tmp_path / "a.safetensors")
    plain = {prefix: glora.remove(model) for prefix, model in models.items()}
    interop.load_lycoris(plain, tmp_path / "a.safetensors", strict=True)
    exchanged = dict(zip(plain, [glora.remove(model) for model in plain.values()][::-1], strict=True))
    before: list[Tensor] = [model[0].weight.clone() for model in exchanged.values()]
    with pytest.raises(glora.AdapterFileError, match="others than this base"):
        interop.load_lycoris(exchanged, tmp_path / "a.safetensors", strict=True)
    assert all(torch.equal(model[0].weight, weight) for model, weight in zip(exchanged.values(), before, strict=True))
    assert not any(glora.adapters(model) for model in exchanged.values())
