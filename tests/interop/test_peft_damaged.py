"""Strangers' files of PEFT: damaged or forged ones are AdapterFileErrors by name, and nothing has changed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.files import damages, misshapen
from tests.helpers.peers import every
from tests.helpers.state import snapshot

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

TENSORS, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
QK: dict[str, Any] = {"target_modules": ["q", "k"]}
CONVS: dict[str, Any] = {"target_modules": ["q", "conv1", "conv2"], "init_weights": False}
CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=2, target_modules=["emb", "q", "conv1"], bias="all", modules_to_save=["head"]),
    "DoRA": peft.LoraConfig(r=2, target_modules=["q", "conv2"], use_dora=True),
    "experts": peft.LoraConfig(r=2, target_modules=["q"], target_parameters=["gate_up_proj", "down_proj"]),
    "rows": peft.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"emb": [1, 2]}),
    "AdaLoRA": peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, **QK),
    "LoHa": peft.LoHaConfig(r=2, use_effective_conv2d=True, **CONVS),
    "LoKr": peft.LoKrConfig(r=1, use_effective_conv2d=True, decompose_both=True, **CONVS),
    "VeRA": peft.VeraConfig(r=2, **QK),
    "RandLoRA": peft.RandLoraConfig(r=2, **QK),
    "VB-LoRA": peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=2, topk=2, save_only_topk_weights=True, **QK),
    "MiSS": peft.MissConfig(r=2, **QK),
    "HiRA": peft.HiraConfig(r=2, target_modules=["emb", "q", "conv1"]),
    "IA3": peft.IA3Config(target_modules=["q", "conv2"], feedforward_modules=["conv2"]),
    "GLoRA": peft.GloraConfig(r=2, **QK),
}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    10**400,
    1e999,
    "",
    "(",
    "lora",
    [],
    [1],
    ["(", "q"],
    {},
    {"(": 2},
    {"q": -1},
    {"q": None},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name, config in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp("saved")
        peft.get_peft_model(every(), config).save_pretrained(folders[name])
    return folders


def forged(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """One of many ways in which tensors may be other than PEFT's."""
    tensors, key = dict(tensors), rng.choice(sorted(tensors))
    tensor, kind = tensors[key], rng.randrange(10)
    at = rng.randrange(max(tensor.ndim, 1))
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[key.replace("lora_A", "lora_C").replace("_w1", "_w3") + rng.choice(["", "x", ".weight"])] = tensors.pop(
            key
        )
    elif kind == 2:
        tensors[rng.choice(["x", "base_model.model.q", "base_model.model.none.lora_A.weight", "base_model.vera_A"])] = (
            tensor
        )
    elif 3 <= kind <= 6:
        tensors[key] = misshapen(tensor, kind - 3, at, 5000, rng)
    elif kind == 7:
        tensors[key.replace(".q.", ".k.").replace(".conv1.", ".norm.")] = tensors.pop(key)
    elif kind == 8:
        tensors = {key: tensors[key]}
    else:
        tensors[key.replace(".lora", ".base_layer.base_layer.base_layer.lora")] = tensors.pop(key)
    return {key: tensor.clone() for key, tensor in tensors.items()}


def damage(folder: Path, other: Path, rng: random.Random) -> None:
    """Damage one of the folder's files."""
    config, tensors = folder / CONFIG, load_file(folder / TENSORS)
    kind = rng.randrange(8)
    if kind == 0:
        text = config.read_bytes()
        (folder / TENSORS).write_bytes(
            damages((folder / TENSORS).read_bytes(), (other / TENSORS).read_bytes(), text, rng)
        )
    elif kind == 1:
        config.write_bytes(damages(config.read_bytes(), (other / CONFIG).read_bytes(), b"[]", rng))
    elif kind == 2:
        shutil.copy(other / rng.choice([CONFIG, TENSORS]), folder)
    elif kind == 3:
        said = json.loads(config.read_text())
        key = rng.choice(sorted(said))
        said[key] = rng.choice(ODD)
        config.write_text(json.dumps(said))
    else:
        save_file(forged(tensors, rng), folder / TENSORS)
    if rng.random() < 0.2 and kind > 3:
        torch.save(forged(tensors, rng), folder / PICKLED)
        (folder / TENSORS).unlink()


def loaded(model: nn.Module, folder: Path) -> str:
    """Load, and take it off again; or why it was refused."""
    try:
        interop.load_peft(model, folder)
    except glora.AdapterFileError as error:
        return str(error)
    glora.remove(model)
    return ""


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_files_are_named_and_change_nothing(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """25 a method, 350 in all. What is loaded all the same is an adapter, and comes off to the bit."""
    rng, model, refused = random.Random(name), every(), 0
    before = snapshot(model)
    for number in range(25):
        folder = tmp_path / str(number)
        shutil.copytree(saved[name], folder)
        damage(folder, saved[rng.choice(sorted(saved))], rng)
        message = loaded(model, folder)
        refused += str(folder) in message
        assert not message or str(folder) in message
        assert snapshot(model) == before
    assert refused >= 8


@pytest.mark.parametrize("seed", range(3))
def test_a_view_that_claims_more_than_it_holds_is_refused(seed: int, saved: dict[str, Path], tmp_path: Path) -> None:
    """A few bytes could ask for terabytes: a stride of zero in a file of torch.save."""
    shutil.copytree(saved["LoRA"], tmp_path / "x")
    tensors = load_file(tmp_path / "x" / TENSORS)
    key = sorted(tensors)[seed]
    tensors[key] = torch.ones(1).expand(1_000_000, 1_000_000)
    (tmp_path / "x" / TENSORS).unlink()
    torch.save(tensors, tmp_path / "x" / PICKLED)
    with pytest.raises(glora.AdapterFileError, match="all of their numbers"):
        interop.load_peft(every(), tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("MiSS", "q.miss_block", (200_000, 8)),
        ("VeRA", "q.vera_lambda_d", (4_000_000,)),
        ("RandLoRA", "q.randlora_lambda", (4_000_000, 1)),
        ("LoHa", "q.hada_w1_a", (8, 400_000)),
        ("LoHa", "conv1.hada_w1_b", (2, 400_000)),
        ("LoKr", "q.lokr_w1_a", (2, 400_000)),
    ],
)
def test_a_rank_beyond_use_is_refused_before_it_takes_memory(
    name: str, key: str, shape: tuple[int, ...], saved: dict[str, Path], tmp_path: Path
) -> None:
    """Tensors of some megabytes whose products would take hundreds of gigabytes."""
    shutil.copytree(saved[name], tmp_path / "x")
    tensors = load_file(tmp_path / "x" / TENSORS)
    tensors[f"base_model.model.{key}"] = torch.ones(shape)
    save_file(tensors, tmp_path / "x" / TENSORS)
    with pytest.raises(glora.AdapterFileError, match="do not go together"):
        interop.load_peft(every(), tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "forged"),
    [
        ("LoKr", {"q.lokr_w1": (1, 10_000_000)}),  # an identity of its columns would have 1e14 numbers
        ("LoKr", {"q.lokr_w2": (1, 10_000_000)}),
        ("LoKr", {"q.lokr_w1": (10_000_000, 1)}),
        ("LoKr", {"conv2.lokr_w2": (1, 1, 10_000_000)}),
        ("LoKr", {"q.lokr_w1_a": (2, 1), "q.lokr_w1_b": (1_000_000, 2), "q.lokr_w2_b": (1_000_000, 3)}),
        ("LoKr", {"conv1.lokr_t2": (1_000_000, 1, 3, 1), "conv1.lokr_w2_b": (1, 1_000_000)}),
        ("LoHa", {"q.hada_w1_a": (8, 1), "q.hada_w2_a": (8, 1), "q.hada_w1_b": (10**6, 6), "q.hada_w2_b": (10**6, 6)}),
        ("LoHa", {"conv2.hada_t1": (1_000_000, 2, 1, 3)}),
        ("AdaLoRA", {"q.lora_A": (1_000_000, 1), "q.lora_E": (1, 1_000_000)}),
        ("VeRA", {"q.vera_lambda_b": (8, 1_000_000)}),
        ("VeRA", {"q.vera_lambda_d": (2, 6)}),
        ("RandLoRA", {"q.randlora_lambda": (2, 100_000), "q.randlora_gamma": (100_000, 6)}),
        ("RandLoRA", {"q.randlora_lambda": (2, 3, 6)}),
    ],
)
def test_sizes_are_compared_before_tensors_are_multiplied_out(
    name: str, forged: dict[str, tuple[int, ...]], saved: dict[str, Path], tmp_path: Path
) -> None:
    """Factors of some megabytes, of which terabytes would be asked for: refused, and not by the allocator."""
    shutil.copytree(saved[name], tmp_path / "x")
    tensors = load_file(tmp_path / "x" / TENSORS)
    for key, shape in forged.items():
        whole, _, letter = key.rpartition("_")
        for other in [whole] if letter in "ab" else [f"{key}_a", f"{key}_b"]:
            tensors.pop(f"base_model.model.{other}", None)
        tensors[f"base_model.model.{key}"] = torch.ones(shape)
    save_file(tensors, tmp_path / "x" / TENSORS)
    with pytest.raises(glora.AdapterFileError, match="has|have no") as refused:
        interop.load_peft(every(), tmp_path / "x")
    assert "alloc" not in str(refused.value)


def test_a_folder_without_files_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        interop.load_peft(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        interop.load_peft(nn.Sequential(nn.Linear(2, 2)), tmp_path)
