"""LyCORIS's files: what they compute, to 1e-5, against LyCORIS itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.calls import only
from tests.helpers.peers import Layers, X, adapted, layers, net

lycoris = pytest.importorskip("lycoris.modules.glora", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own


def lycoris_net(alpha: float) -> tuple[dict[str, Tensor], nn.Module]:
    """A file's tensors as LyCORIS saves them, and a model that computes with its modules."""
    model, tensors = net(), {}
    torch.manual_seed(3)
    for name in ("q", "k"):
        module = lycoris.GLoRAModule(f"lycoris_block_{name}", model.block[name], lora_dim=3, alpha=alpha).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        tensors |= {f"lycoris_block_{name}.{k}": v.detach().clone() for k, v in module.custom_state_dict().items()}
        module.apply_to()
        model.__dict__[f"kept_{name}"] = module
    return tensors, model


@pytest.mark.parametrize("layout", ["today's", "before version 3"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_lycoris_saved_computes_what_lycoris_computes(layout: str, suffix: str, tmp_path: Path) -> None:
    tensors, model = lycoris_net(alpha=2.0)
    if layout != "today's":  # a1 and a2, b1 and b2 held each other's place
        exchanged = str.maketrans("12", "21")
        tensors = {
            k if k.endswith("alpha") else k[:-9] + k[-9:].translate(exchanged): v.contiguous()
            for k, v in tensors.items()
        }
    file = tmp_path / f"adapter{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    ours = interop.load_lycoris(net(), file)
    torch.testing.assert_close(ours(X), model(X), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(X), net()(X), atol=1e-3)


@given(
    layers(),
    st.integers(1, 3),
    st.sampled_from([0, 1, 2.5, 4]),
    st.booleans(),
    st.booleans(),
)
def test_lycoris_to_glora_to_lycoris(
    tmp_path_factory: Any, made: Layers, rank: int, alpha: float, rs_lora: bool, is_zero: bool
) -> None:
    directory = tmp_path_factory.mktemp("lycoris")
    model, tensors = made.model(), dict[str, Tensor]()
    modules = []
    for number, layer in enumerate(model.block):
        name = f"lycoris_block_{number}"
        module = lycoris.GLoRAModule(name, layer, lora_dim=rank, alpha=alpha, rs_lora=rs_lora).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        tensors |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in module.custom_state_dict().items()}
        if is_zero and alpha == 0:  # LyCORIS writes the rank, and reads 0 as the rank
            tensors[f"{name}.alpha"] = torch.tensor(0)
        modules.append(module)
    for module in modules:
        module.apply_to()
    save_file(tensors, directory / "theirs.safetensors")
    ours = interop.load_lycoris(made.model(), directory / "theirs.safetensors", rs_lora=rs_lora)
    torch.testing.assert_close(ours(made.input()), model(made.input()), atol=1e-5, rtol=1e-4)
    interop.save_lycoris(ours, directory / "ours.safetensors", rs_lora=rs_lora)
    again = load_file(directory / "ours.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        if key.endswith("alpha"):
            assert again[key].item() == pytest.approx(float(tensor) or rank)
        else:
            assert torch.equal(again[key], tensor)


@given(layers(), st.integers(1, 3), st.sampled_from([None, 1.0, 7.5]), st.booleans(), st.sampled_from(["AB", "A", "B"]))
def test_glora_to_lycoris_to_glora(
    tmp_path_factory: Any, made: Layers, rank: int, alpha: float | None, rs_lora: bool, paths: str
) -> None:
    file = tmp_path_factory.mktemp("lycoris") / "a.safetensors"
    forms = only(**dict.fromkeys(paths, "lora"))
    config = replace(forms, rank=rank, alpha=alpha, product="matmul" if "A" in paths else "hadamard", init="random")
    ours = glora.apply(made.model(), r"block\.\d", config)
    interop.save_lycoris(ours, file, rs_lora=rs_lora)
    again = interop.load_lycoris(made.model(), file, rs_lora=rs_lora)
    for one, other in zip(ours.block, again.block, strict=True):
        torch.testing.assert_close(other.weight, one.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(torch.nan), torch.tensor(-1.0), torch.tensor(1j)])
def test_an_odd_alpha_is_an_adapter_file_error(alpha: Tensor, tmp_path: Path) -> None:
    tensors, _ = lycoris_net(alpha=2.0)
    save_file(tensors | {"lycoris_block_q.alpha": alpha}, tmp_path / "adapter.safetensors")
    with pytest.raises(glora.AdapterFileError, match="lycoris_block_q"):
        interop.load_lycoris(net(), tmp_path / "adapter.safetensors")


def test_lycoris_computes_what_was_saved_for_it(tmp_path: Path) -> None:
    ours = adapted(A="lora", B="lora", C="none", D="none", E="none", product="matmul", alpha=5.0)
    interop.save_lycoris(ours, tmp_path / "adapter.safetensors")
    tensors, model = load_file(tmp_path / "adapter.safetensors"), net()
    for name in ("q", "k"):
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"lycoris_block_{name}.")}
        parts = [own[f"{part}.weight"] for part in ("a1", "a2", "b1", "b2")]
        module = lycoris.GLoRAModule.make_module_from_state_dict(name, model.block[name], *parts, None, own["alpha"])
        module.eval().apply_to()
        model.__dict__[f"kept_{name}"] = module
    torch.testing.assert_close(model(X), ours(X), atol=1e-5, rtol=1e-5)
    again = interop.load_lycoris(net(), tmp_path / "adapter.safetensors")
    torch.testing.assert_close(again(X), ours(X), atol=1e-5, rtol=1e-5)


def test_what_lycoris_cannot_say_is_refused(tmp_path: Path) -> None:
    for options in ({"product": "matmul"}, {"C": "none", "D": "none", "E": "none"}):
        with pytest.raises(ValueError, match="nothing was"):
            interop.save_lycoris(adapted(**options), tmp_path / "out.safetensors")
    one_name = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    for model, named in ((one_name, "the one name 'lycoris_a_b'"), (nn.Linear(2, 2), "on the model itself")):
        with pytest.raises(ValueError, match=named):
            interop.save_lycoris(glora.apply(model, config=glora.GLoRAConfig.lora()), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    torch.save({"lycoris_other.alpha": torch.tensor(1.0)}, tmp_path / "bad.pt")
    with pytest.raises(glora.AdapterFileError, match="underscores"):
        interop.load_lycoris(net(), tmp_path / "bad.pt")


def test_a_file_for_lycoris_knows_its_base(tmp_path: Path) -> None:
    file, other = tmp_path / "adapter.safetensors", net()
    interop.save_lycoris(adapted(product="matmul", C="none", D="none", E="none"), file)
    interop.load_lycoris(net(), file, strict=True)
    with torch.no_grad():
        other.block["k"].weight.neg_()
    with pytest.raises(glora.AdapterFileError, match=r"in block\.k\.weight\. "):
        interop.load_lycoris(other, file, strict=True)
