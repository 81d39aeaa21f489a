"""Other libraries' files: what they compute, to 1e-5, against the libraries themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora import interop
from tests import reference

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")
lycoris = pytest.importorskip("lycoris.modules.glora", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"q": nn.Linear(6, 8), "k": nn.Linear(8, 8, bias=False)})
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.block["k"](self.block["q"](x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
FORMS = [
    {"config_A_B": ab, "config_C": c, "config_D_E": de}
    for ab, c, de in (
        ("lora", "lora", "constant"),
        ("lora", "vector", "vector"),
        ("vector", "none", "none"),
        ("constant", "none", "vector"),
        ("none", "lora", "vector"),
    )
]
CONFIGS: list[Any] = [
    *[peft.GloraConfig(r=3, target_modules=["q", "k"], **forms) for forms in FORMS],
    peft.GloraConfig(r=3, target_modules=["q"], modules_to_save=["head", "norm"]),
    peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q", "k"]),
    peft.LoraConfig(r=2, target_modules=["q", "k"], rank_pattern={"k": 3}, alpha_pattern={"block.q": 7}),
    peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q", "k"], use_rslora=True, modules_to_save=["head"]),
    peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q", "k"], lora_bias=True),
    peft.HiraConfig(r=2, target_modules=["q", "k"], rank_pattern={"k": 3}),
    peft.IA3Config(target_modules=["q", "k"], feedforward_modules=["k"]),
    peft.IA3Config(target_modules=["q", "k"], feedforward_modules=[]),
]


def trained(config: Any) -> nn.Module:
    model = peft.get_peft_model(net(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type.value)
def test_what_peft_saved_computes_what_peft_computes(config: Any, tmp_path: Path) -> None:
    model = trained(config)
    model.save_pretrained(tmp_path)
    ours = interop.load_peft(net(), tmp_path).eval()
    torch.testing.assert_close(ours(X), model(X), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(X), net()(X), atol=1e-3)
    merged = glora.merge(ours)
    torch.testing.assert_close(merged(X), model(X), atol=1e-5, rtol=1e-5)


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(2)
    targets, trainable = options.pop("targets", ["q", "k"]), options.pop("trainable", ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = glora.apply(
            net(), targets, glora.GLoRAConfig(init="random", rank=3, **options), trainable=trainable
        ).eval()
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"A": "lora", "B": "lora", "C": "lora", "D": "vector", "E": "vector", "alpha": 5.0},
        {"A": "vector", "B": "vector", "C": "vector", "D": "constant", "E": "constant"},
        {"A": "constant", "B": "constant", "C": "none", "D": "none", "E": "none", "trainable": ["head"]},
        {"A": "none", "B": "none", "C": "vector", "D": "vector", "E": "vector", "targets": ["q"]},
    ],
)
def test_peft_computes_what_was_saved_for_it(options: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(**options)
    interop.save_peft(ours, tmp_path)
    model = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(model(X), ours(X), atol=1e-5, rtol=1e-5)
    again = interop.load_peft(net(), tmp_path).eval()
    torch.testing.assert_close(again(X), ours(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"A": "vector"}, "A=vector and B=lora"),
        ({"D": "none"}, "D=none and E=vector"),
        ({"product": "matmul"}, "product='matmul'"),
        ({"create_bias": True}, "bias that was created"),
    ],
)
def test_what_peft_cannot_say_is_refused_by_name(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        interop.save_peft(adapted(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (peft.LoraConfig(r=2, target_modules=["q"], use_dora=True), "use_dora"),
        (peft.LoraConfig(r=2, target_modules=["q"], bias="lora_only"), "bias='lora_only'"),
        (peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa"), "pissa"),
        (peft.LoHaConfig(r=2, target_modules=["q"]), "LOHA"),
    ],
)
def test_what_glora_does_not_do_is_refused_by_name(config: Any, named: str, tmp_path: Path) -> None:
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    model = net()
    with pytest.raises(glora.AdapterFileError, match=named):
        interop.load_peft(model, tmp_path)
    assert not glora.adapters(model)


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


CONFIG = glora.GLoRAConfig()
AUTHORS = [
    {"A": "LoRA_4", "B": "vector", "C": "none", "D": "constant", "E": "vector"},
    {"A": "constant", "B": "LoRA_2", "C": "vector", "D": "vector", "E": "none"},
]


def test_the_authors_files_with_the_forms_that_were_chosen(tmp_path: Path) -> None:
    # The authors' layer from its formula, for a supernet of rank 4.
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 2))
    tensors: dict[str, Tensor] = {"2.weight": torch.randn(2, 3), "2.bias": torch.randn(2)}
    y = X
    for number, choice in enumerate(AUTHORS):
        layer = model[number]
        o, i = layer.out_features, layer.in_features
        own = {n: 0.3 * torch.randn(o, 4) for n in ("Ad", "Bd")} | {n: 0.3 * torch.randn(4, i) for n in ("Au", "Bu")}
        own |= {"Cd": torch.randn(i, 4), "Cu": torch.randn(4, 1), "D": torch.randn(o), "E": torch.randn(o)}
        tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        paths: dict[str, Any] = {}
        for name, form in choice.items():
            whole = own[name] if name in "DE" else own[f"{name}d"][:, :1]
            rank = int(form[5:] or 0) if form.startswith("LoRA") else 0
            paths[name] = {"vector": whole, "constant": whole.reshape(-1)[:1], "none": None}.get(form)
            if rank:
                paths[name] = (own[f"{name}d"][:, :rank], own[f"{name}u"][:rank])
        weight = reference.weight(layer.weight.detach(), [(1.0, paths["A"], paths["B"], "hadamard")])
        bias = reference.bias(layer.weight.detach(), layer.bias.detach(), [(1.0, paths["C"], paths["D"], paths["E"])])
        y = reference.linear(y, weight, bias).float()
    y = y @ tensors["2.weight"].T + tensors["2.bias"]
    torch.save(tensors, tmp_path / "caltech101.pt")
    ours = interop.load_official(model, tmp_path / "caltech101.pt", AUTHORS)
    torch.testing.assert_close(ours(X), y, atol=1e-5, rtol=1e-5)
    wrongs = {"one entry a layer": AUTHORS[:1], "rank 5": glora.GLoRAConfig(rank=5), "each layer": {"0": CONFIG}}
    for message, wrong in wrongs.items():
        with pytest.raises(ValueError, match=message):
            interop.load_official(model, tmp_path / "caltech101.pt", wrong, name="b")
    torch.save({"0.Ad": torch.zeros(8, 4)}, tmp_path / "part.pt")
    with pytest.raises(glora.AdapterFileError, match="Each layer"):
        interop.load_official(model, tmp_path / "part.pt", AUTHORS, name="b")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    with pytest.raises(glora.AdapterFileError, match="tensors alone"):
        interop.load_official(model, tmp_path / "pickle.pt", AUTHORS, name="b")
