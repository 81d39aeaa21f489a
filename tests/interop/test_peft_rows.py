"""Rows of embeddings that PEFT trained alone come as rows, and go back as they came."""

from __future__ import annotations

import json
from collections import OrderedDict
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
from tests.helpers.marks import examples
from tests.helpers.peers import assert_same

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Scaled(nn.Embedding):
    """As Gemma has it: the rows are looked up, and scaled."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def model(tokens: int = 40, features: int = 6, seed: int = 0, kind: type[nn.Embedding] = nn.Embedding) -> nn.Module:
    torch.manual_seed(seed)
    layers = {"emb": kind(tokens, features), "q": nn.Linear(features, 8), "k": nn.Linear(8, 4)}
    return nn.Sequential(OrderedDict(layers))


def trained(base: nn.Module, rows: list[int], *, beside: bool, directory: Path) -> nn.Module:
    """PEFT's model with trained rows, beside a LoRA or alone, saved."""
    if beside:
        config = peft.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"emb": rows})
    else:
        config = peft.TrainableTokensConfig(target_modules=["emb"], token_indices=rows)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(directory)
    return theirs


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    tokens, features = draw(st.integers(2, 40)), draw(st.integers(1, 8))
    return tokens, features, draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=5, unique=True))


@examples(25)
@given(sizes(), st.booleans(), st.integers(0, 9))
def test_rows_come_and_go_as_rows(
    tmp_path_factory: Any, size: tuple[int, int, list[int]], beside: bool, seed: int
) -> None:
    """What they compute is PEFT's, alone, merged, routed and away; they take no more than the embedding does."""
    (tokens, features, rows), directory = size, tmp_path_factory.mktemp("rows")
    ids = torch.arange(tokens).repeat(2, 1)
    theirs = trained(model(tokens, features, seed), rows, beside=beside, directory=directory)
    base = model(tokens, features, seed)
    ours = interop.load_peft(model(tokens, features, seed), directory).eval()
    assert_same(ours(ids), theirs(ids), base(ids))
    with glora.merged(ours):
        assert_same(ours(ids), theirs(ids), base(ids))
    with glora.route(ours, ["default", None]):
        assert_same(ours(ids), torch.stack([theirs(ids)[0], base(ids)[1]]), base(ids))
    with glora.disabled(ours):
        assert torch.equal(ours(ids), base(ids))
    held = {key: tensor for key, tensor in glora.state_dict(ours).items() if key.startswith("emb.")}
    as_rows = len(rows) * (tokens + features)
    assert sum(tensor.numel() for tensor in held.values()) == min(as_rows, tokens * features)
    assert ("emb.weight" in held) == (as_rows >= tokens * features)
    if as_rows < tokens * features:
        interop.save_peft(ours, directory / "back")
        came, back = (json.loads((folder / CONFIG).read_text()) for folder in (directory, directory / "back"))
        for field in ("peft_type", "target_modules", "trainable_token_indices", "token_indices", "r"):
            assert back.get(field) == came.get(field)
        came, back = (load_file(folder / TENSORS) for folder in (directory, directory / "back"))
        assert came.keys() == back.keys()
        for key, tensor in came.items():
            torch.testing.assert_close(back[key], tensor, rtol=1e-6, atol=1e-7)
        again = peft.PeftModel.from_pretrained(model(tokens, features, seed), str(directory / "back")).eval()
        assert_same(again(ids), theirs(ids), base(ids))
    assert torch.equal(glora.remove(ours)(ids), base(ids))


def test_another_base_gets_the_same_rows(tmp_path: Path) -> None:
    """PEFT's rows stand for themselves, whatever the base has there."""
    trained(model(), [3, 17], beside=False, directory=tmp_path)
    ours = interop.load_peft(model(seed=1), tmp_path)
    rows = load_file(tmp_path / TENSORS)["base_model.model.emb.trainable_tokens_delta"]
    torch.testing.assert_close(ours.emb(torch.tensor([3, 17])), rows)
    assert torch.equal(ours.emb(torch.tensor([4])), model(seed=1).emb(torch.tensor([4])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_the_same_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = trained(model().to(dtype), [3, 17], beside=False, directory=tmp_path)
    ours = interop.load_peft(model().to(dtype), tmp_path)
    ids = torch.arange(40)
    assert torch.equal(ours.emb(ids), theirs.base_model.model.emb(ids))


def test_indices_from_the_end_and_twice_are_rows_too(tmp_path: Path) -> None:
    """The last one counts, as where they are written one after the other."""
    trained(model(), [39, 3, 4], beside=False, directory=tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"token_indices": [-1, 3, 3]}))
    ours = interop.load_peft(model(), tmp_path)
    rows = load_file(tmp_path / TENSORS)["base_model.model.emb.trainable_tokens_delta"]
    torch.testing.assert_close(ours.emb(torch.tensor([39, 3])), rows[[0, 2]])
    assert glora.state_dict(ours)["emb.B.left"].shape == (40, 2)


@pytest.mark.parametrize("kind", [Scaled, lambda *size: nn.Embedding(*size, max_norm=100.0)])
def test_an_embedding_that_computes_otherwise_is_a_head(kind: Any, tmp_path: Path) -> None:
    theirs = trained(model(), [3], beside=True, directory=tmp_path)
    base = model(kind=kind)
    ours = interop.load_peft(base, tmp_path)
    assert "emb.weight" in glora.state_dict(ours)
    factor = 3 if kind is Scaled else 1
    ids = torch.arange(40)
    torch.testing.assert_close(ours.emb(ids), factor * theirs.base_model.model.emb(ids))


def test_rows_beside_another_adapter_stay_rows(tmp_path: Path) -> None:
    """The embedding of a model that has adapters already looks rows up too."""
    theirs, ids = trained(model(), [3, 5], beside=True, directory=tmp_path), torch.arange(40)
    ours = interop.load_peft(interop.load_peft(model(), tmp_path, name="a"), tmp_path, name="b")
    assert "emb.B.left" in glora.state_dict(ours, "b")
    assert_same(ours(ids), theirs(ids), model()(ids))


def test_a_file_with_a_lora_on_the_same_embedding_is_refused(tmp_path: Path) -> None:
    """PEFT writes none; either would be lost without a word."""
    trained(model(), [3], beside=True, directory=tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    factors = {"A": torch.ones(2, 40), "B": torch.ones(6, 2)}
    tensors |= {f"base_model.model.emb.lora_embedding_{name}": factor for name, factor in factors.items()}
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(glora.AdapterFileError, match="'emb' has trained rows and another adapter"):
        interop.load_peft(model(), tmp_path)


def test_a_lora_whose_left_picks_rows_of_two_embeddings_is_written_as_a_lora(tmp_path: Path) -> None:
    """TRAINABLE_TOKENS has the same rows for all its modules."""
    base = nn.ModuleDict({"a": nn.Embedding(30, 5), "b": nn.Embedding(30, 5), "q": nn.Linear(5, 5)})
    glora.apply(base, ["a", "b"], glora.GLoRAConfig.lora(rank=1))
    with torch.no_grad():
        for key, parameter in glora.named_parameters(base):
            if key.endswith("left"):
                parameter[3 if key.startswith("a") else 4] = 1
    interop.save_peft(base, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORA"
