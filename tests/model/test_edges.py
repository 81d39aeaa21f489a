"""What one line each of the rooms of model/ sees to, over all kinds of modules that it is for."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from glora import GLoRAConfig
from glora.layer.factors import LowRank
from tests.helpers.calls import RANDOM, attach, only, quiet
from tests.helpers.kinds import KINDS, Kind
from tests.helpers.quantised import quantise_rows


@given(st.lists(st.integers(1, 6), max_size=2), st.integers(1, 8))
def test_each_matrix_of_a_batch_starts_as_one_alone_does(batch: list[int], rank: int) -> None:
    size = 256
    path = LowRank(torch.empty(*batch, 3, rank), torch.empty(*batch, rank, size), GLoRAConfig.glora(rank=rank))
    with torch.no_grad():
        path.reset_parameters(None)
    for right in path.right.detach().reshape(-1, rank, size):
        assert 0.9 / size**0.5 < right.abs().max() <= 1 / size**0.5


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_another_base_is_named_whatever_kind_holds_it(kind: Kind, name: str, tmp_path: Path) -> None:
    model = kind.build()
    base, tensor = copy.deepcopy(model), kind.weight if name == "weight" else kind.bias
    if tensor is None:
        return
    attach(model, RANDOM, targets=[kind.path])
    glora.save(model, tmp_path)
    with quiet():
        glora.load(copy.deepcopy(base), tmp_path, strict=True)
    with torch.no_grad():
        base.get_parameter(f"0.{tensor}").add_(1)
    with pytest.raises(glora.AdapterFileError, match=rf"0\.{tensor}"):
        glora.load(base, tmp_path, strict=True)


@pytest.mark.parametrize("forms", [{"B": "lora"}, {"A": "vector"}, {"B": "lora", "E": "vector"}, {"C": "vector"}])
@pytest.mark.parametrize("first", [True, False])
def test_a_bias_that_another_adapter_made_is_not_in_this_ones_file(
    forms: dict[str, str], first: bool, tmp_path: Path
) -> None:
    model, base = nn.Sequential(nn.Linear(3, 3, bias=False)), nn.Sequential(nn.Linear(3, 3, bias=False))
    base.load_state_dict(model.state_dict())
    makes = not {"C", "E"}.isdisjoint(forms)
    for name in ("other", "this") if first else ("this", "other"):
        config = only(**(forms if name == "this" else {"E": "vector"}), create_bias=makes or name == "other")
        glora.apply(model, config=config, name=name)
    glora.save(model, tmp_path, "this")
    glora.load(base, tmp_path, strict=True)
    assert (base[0].bias is not None) == makes
    described = json.loads((tmp_path / "glora_config.json").read_text())
    assert described["layers"]["0"]["create_bias"] == makes


def test_a_bias_is_baked_in_before_the_weight_that_it_multiplies() -> None:
    for config in (RANDOM, only(C="vector", B="lora", init="random"), only(A="constant", C="lora", init="random")):
        model, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(3, 64)
        quantise_rows(model)
        attach(model, config)
        y = model(x)
        torch.testing.assert_close(glora.merge(model, dequantize=True)(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_bias_is_no_matrix_however_many_axes_it_has(kind: Kind) -> None:
    model = kind.build()
    matrices = {key: tensor for key, tensor in model.state_dict().items() if tensor.ndim > 1}
    if "Embedding" in str(kind):
        matrices = {}  # embeddings do not count
    found = glora.plan(model, [kind.path], only(B="lora")).coverage
    assert found is not None
    assert found.total == sum(tensor.numel() for key, tensor in matrices.items() if not key.endswith("bias"))
