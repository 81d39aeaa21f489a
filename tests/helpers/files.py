"""What the tests of files share."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from tests.helpers import internals


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))


def saved(directory: Path, seed: int = 0) -> nn.Module:
    made = glora.apply(
        small_model(seed), ["0", "2"], glora.GLoRAConfig.glora(init="random", rank=2, create_bias=True), trainable=["1"]
    )
    with torch.no_grad():
        for parameter in glora.parameters(made):
            parameter.add_(0.1)
    glora.save(made, directory)
    return made


def stored_sum(directory: Path) -> str:
    """The sum over all that the file says; its bytes may differ, safetensors orders metadata at random."""
    return read_metadata(directory)["sha256"]


def most_bytes_of_a_header(count: int) -> AbstractContextManager[Any]:
    """How long a safetensors file's header may be."""
    return mock.patch("glora.files.container._MOST_HEADER", count)


def raw_file(file: Path, tensors: Mapping[str, tuple[str, list[int], bytes]], metadata: Mapping[str, str]) -> None:
    """A safetensors file of tensors as dtype, shape and bytes, whose dtypes torch need not have."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def raw_tensors(file: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str], str]:
    """The tensors of a safetensors file as dtype, shape and bytes; its metadata; what is behind the header's JSON."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    text = data[8:start].decode()
    header, end = json.JSONDecoder().raw_decode(text)
    metadata = header.pop("__metadata__", {})
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for key, said in header.items():
        first, last = said["data_offsets"]
        found[key] = said["dtype"], said["shape"], data[start + first : start + last]
    return found, metadata, text[end:]


def sharded(folder: Path, model: nn.Module) -> Path:
    """A checkpoint in two shards, the first tensor alone in the first; its index."""
    tensors = model.state_dict()
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((list(tensors)[:1], list(tensors)[1:])):
        save_file({key: tensors[key] for key in keys}, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(keys, f"model-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def half_precision_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)).bfloat16()


def saved_half_precision(directory: Path, **options: Any) -> nn.Module:
    config = glora.GLoRAConfig.glora(init="random", rank=2, **options)
    model = glora.apply(half_precision_model(), ["0", "1"], config, trainable=["3"])
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(0.1)
    glora.save(model, directory)
    return model


def damages(good: bytes, other: bytes, text: bytes, rng: random.Random) -> bytes:
    """One of many ways in which a file may be damaged."""
    kind = rng.randrange(7)
    at = rng.randrange(len(good))
    header = int.from_bytes(good[:8], "little")
    if kind == 0:
        return good[:at]
    if kind == 1:
        return good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
    if kind == 2:
        at = rng.randrange(min(len(good), 8 + header))
        return good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
    if kind == 3:  # another's body under this one's header, and the reverse
        return good[: 8 + header] + other[8 + header :] if rng.random() < 0.5 else other[:at] + good[at:]
    if kind == 4:
        return rng.choice([text, b"", rng.randbytes(at), good + rng.randbytes(1 + at)])
    if kind == 5:
        bomb = b"[" * (1000 + at) if rng.random() < 0.5 else b'{"a":' * (1000 + at)
        return rng.choice([len(bomb).to_bytes(8, "little") + bomb, (2**62 + at).to_bytes(8, "little") + good[8:]])
    end = min(len(good), at + 1 + rng.randrange(64))
    return good[:at] + rng.randbytes(end - at) + good[end:]


def parsed(data: bytes) -> tuple[object, bytes] | None:
    """The header's JSON and the body; None where there is no such thing."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        return json.loads(data[8:end]), data[end:]
    except (ValueError, RecursionError):
        return None


def is_reordered(damaged: bytes, good: bytes) -> bool:
    """Whether the same is said in another order: safetensors orders its metadata at random."""
    return sorted(damaged) == sorted(good) and parsed(damaged) == parsed(good)


def copied_without_base(directory: Path, to: Path, **fields: Any) -> None:
    """An adapter's file as versions before fingerprints wrote it; or with these fields in its description."""
    tensors, metadata = load_file(directory / "adapter_model.safetensors"), read_metadata(directory)
    description = json.loads(metadata["glora"])
    del description["base"]
    text = json.dumps(description | fields, sort_keys=True)
    to.mkdir()
    save_file(
        tensors,
        to / "adapter_model.safetensors",
        {"format": "pt", "glora": text, "sha256": internals.sum_of_contents(text, tensors)},
    )


def read_metadata(directory: Path) -> dict[str, str]:
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as opened:
        return opened.metadata()


def misshapen(tensor: Tensor, kind: int, at: int, most: int, rng: random.Random) -> Tensor:
    """A tensor of another size along the axis `at`, turned, of another shape, or of another dtype: the kinds 0 to 3."""
    if kind == 0:
        shape = list(tensor.shape) or [1]
        shape[at] = rng.choice([0, 1, shape[at] + 1, 2 * shape[at], most])
        return torch.ones(shape)
    if kind == 1:
        return tensor.mT.contiguous() if tensor.ndim > 1 else tensor[None]
    if kind == 2:
        return torch.ones(rng.choice([(), (1,), (2, 2), (1, 1, 1, 1, 1)]))
    return tensor.to(rng.choice([torch.int64, torch.bool, torch.complex64, torch.int8]))
