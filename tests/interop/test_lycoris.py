"""LyCORIS's files: what they compute, to 1e-5, against LyCORIS itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.peers import X, adapted, net

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
    from safetensors.torch import save_file

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


def test_lycoris_computes_what_was_saved_for_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

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
    torch.save({"lycoris_other.alpha": torch.tensor(1.0)}, tmp_path / "bad.pt")
    with pytest.raises(glora.AdapterFileError, match="underscores"):
        interop.load_lycoris(net(), tmp_path / "bad.pt")
