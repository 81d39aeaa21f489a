"""The norms that `inspect` shows are those of the dense tensors, for every form, product, shape and scale."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import glora
from glora import GLoRAConfig
from glora.__main__ import main
from glora.files import norms
from glora.files.norms import path_norms, update_norms
from glora.model.state import describe
from tests.helpers import reference
from tests.helpers.calls import attach
from tests.helpers.kinds import KINDS, Kind
from tests.helpers.strategies import Case, cases, factors


@given(cases(max_adapters=1), st.sampled_from([1, 7, 2**22]))
def test_they_are_those_of_the_dense_update(case: Case, block: int) -> None:
    layer, config = case.build(), case.configs[0]
    W0, b0 = case.plain().weight.detach().double(), case.plain().bias
    paths = {name: path for name, path in factors(layer, "a0", config).items() if path is not None}
    adapter = describe(layer, "a0")
    of_paths = path_norms(adapter, "", adapter.layers[""])
    for name, path in paths.items():
        whole = path if torch.is_tensor(path) else path[0].double() @ path[1].double()
        size = {"A": W0.shape, "B": W0.shape, "C": (W0.shape[1], 1)}.get(name, W0.shape[:1])
        if name == "A" and config.product == "matmul":
            whole = whole if whole.shape == (W0.shape[1],) * 2 else whole * torch.eye(W0.shape[1])
            size = whole.shape
        assert of_paths[name] == pytest.approx(float(whole.double().expand(size).norm()), rel=1e-6)
    assert of_paths.keys() == paths.keys()
    weight = reference.weight(W0, [(1.0, paths.get("A"), paths.get("B"), config.product)]) - W0
    zeros = torch.zeros(len(W0), dtype=torch.float64)
    frozen = zeros if b0 is None else b0.detach().double()
    bias = reference.bias(W0, frozen, [(1.0, *(paths.get(name) for name in "CDE"))]) - frozen
    with mock.patch.object(norms, "_BLOCK", block):
        found = update_norms(adapter, "", adapter.layers[""], case.plain().weight.detach(), b0)
    assert found.weight == pytest.approx(float(weight.norm()), rel=1e-6, abs=1e-12)
    assert found.bias == pytest.approx(float(bias.norm()), rel=1e-6, abs=1e-12)
    assert found.of_weight == pytest.approx(float(W0.norm()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_they_are_those_of_every_kind_of_module(kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = kind.build()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    attach(model, GLoRAConfig.glora(init="random", alpha=3, A="lora", B="vector", D="none"), targets=[kind.path])
    glora.save(model, tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a"), "--base", str(tmp_path / "base.safetensors")]) == 0
    W, W0 = getattr(kind.module(model), kind.weight).detach(), glora.base_state_dict(model)
    key = next(key for key in W0 if key.endswith(kind.weight))
    update = (W - W0[key]).norm()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "A=lora" in line]
    assert float(row.split()[-3]) == pytest.approx(float(update), rel=1e-2)
    assert float(row.split()[-2].rstrip("%")) == pytest.approx(100 * float(update / W0[key].norm()), rel=1e-2)


@given(st.floats(1e-3, 1e3), st.sampled_from([None, 1.0, 800.0]))
def test_how_factors_are_scaled_against_each_other_is_not_seen_and_alpha_is(scale: float, alpha: float | None) -> None:
    torch.manual_seed(0)
    layer = glora.apply(nn.Linear(9, 7), config=GLoRAConfig.lora(rank=2, alpha=alpha))
    assert path_norms(describe(layer), "", describe(layer).layers[""]) == {"B": 0.0}  # never trained
    tensors = {"B.left": torch.randn(7, 2) * scale, "B.right": torch.randn(2, 9) / scale}
    adapter = describe(glora.load_state_dict(layer, tensors))
    with torch.no_grad():
        update = (layer.weight - glora.base_state_dict(layer)["weight"]).norm()
    assert path_norms(adapter, "", adapter.layers[""])["B"] == pytest.approx(float(update), rel=1e-4)
