"""The authors' files: what they compute, by the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora import interop
from glora.model.state import describe
from tests.helpers import reference
from tests.helpers.peers import X

CONFIG = glora.GLoRAConfig.glora()


AUTHORS = [
    {"A": "LoRA_4", "B": "vector", "C": "none", "D": "constant", "E": "vector"},
    {"A": "constant", "B": "LoRA_2", "C": "vector", "D": "vector", "E": "none"},
]


def test_the_authors_files_with_the_forms_that_were_chosen(tmp_path: Path) -> None:
    # The authors' layer from its formula, for a supernet of rank 4.
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 2))
    base = copy.deepcopy(model)
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
    # The forms are in the model's order, whatever the file's.
    torch.save(dict(sorted(tensors.items(), reverse=True)), tmp_path / "caltech101.pt")
    ours = interop.load_official(model, tmp_path / "caltech101.pt", AUTHORS)
    torch.testing.assert_close(ours(X), y, atol=1e-5, rtol=1e-5)
    configs = {path: layer.config for path, layer in describe(ours).layers.items()}
    assert torch.equal(interop.load_official(base, tmp_path / "caltech101.pt", configs)(X), ours(X))
    wrongs = {"one entry a layer": AUTHORS[:1], "rank 5": glora.GLoRAConfig.glora(rank=5), "each layer": {"0": CONFIG}}
    for message, wrong in wrongs.items():
        with pytest.raises(ValueError, match=message):
            interop.load_official(model, tmp_path / "caltech101.pt", wrong, name="b")
    torch.save({"0.Ad": torch.zeros(8, 4)}, tmp_path / "part.pt")
    with pytest.raises(glora.AdapterFileError, match="Each layer"):
        interop.load_official(model, tmp_path / "part.pt", AUTHORS, name="b")
    torch.save({**tensors, "0.Ad": torch.zeros(8)}, tmp_path / "flat.pt")
    with pytest.raises(glora.AdapterFileError, match="matrices; those of .*flat.pt that have not: 0"):
        interop.load_official(model, tmp_path / "flat.pt", AUTHORS, name="b")
    for odd in ({**AUTHORS[0], "B": "LoRA_x"}, {**AUTHORS[0], "B": "LoRA_2"}, {"A": "none"}):
        with pytest.raises(ValueError, match="with one rank"):
            interop.load_official(model, tmp_path / "caltech101.pt", [odd, AUTHORS[1]], name="b")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    with pytest.raises(glora.AdapterFileError, match="tensors alone"):
        interop.load_official(model, tmp_path / "pickle.pt", AUTHORS, name="b")


def test_the_forms_are_in_the_models_order_and_not_in_that_of_the_names(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(12)])  # "10" comes before "2" by name
    shapes = {"Ad": (3, 2), "Au": (2, 3), "Bd": (3, 2), "Bu": (2, 3), "Cd": (3, 2), "Cu": (2, 1), "D": (3,), "E": (3,)}
    tensors = {f"{n}.{name}": torch.randn(shape) for n in range(12) for name, shape in shapes.items()}
    torch.save(tensors, tmp_path / "a.pt")
    nothing = dict.fromkeys("ABCDE", "none")
    chosen = [nothing | {"ABCDE"[n % 5]: "vector", "B": f"LoRA_{1 + n // 10}"} for n in range(12)]
    interop.load_official(model, tmp_path / "a.pt", chosen)
    for layer, choice in zip(describe(model).layers.values(), chosen, strict=True):
        assert layer.config.forms == {p: "lora" if f.startswith("LoRA") else f for p, f in choice.items()}
