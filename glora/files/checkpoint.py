"""Merging an adapter into a checkpoint, tensor by tensor, without the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from glora.config import BIAS_PATHS, WEIGHT_PATHS
from glora.files.container import import_optional, parse_json, replace_file
from glora.model.attach import attach_spec
from glora.model.merged import merge
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names

# Note [One tensor at a time]
# safetensors writes a file from tensors that are all in memory. A checkpoint may be larger than memory, so the file is
# written here: its header first (eight bytes of length, JSON, padding to eight), which the base's headers and the
# adapter's description determine, then each tensor as it is computed. A layer is merged as a model of that layer by
# `attach_spec` and `merge`, so that every bit is what they make of it: for its weight with A and B alone, for its
# bias with C, D and E alone (C needs W0, which is then read once more).

_INDEX = ".index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the base: its file, dtype as safetensors names it, shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def merge_checkpoint(
    base: Path, adapter: AdapterSpec, source: object, out: Path, progress: Callable[[int, int], object] | None = None
) -> None:
    """Bake an adapter into a checkpoint: the same bits as `glora.merge` on the model, and then saving it.

    Args:
        base: a `.safetensors` file, or the `.safetensors.index.json` of a sharded one. It is not changed.
        adapter: the adapter; its layers are the checkpoint's keys without `.weight`.
        source: the adapter's file, for messages.
        out: the `.safetensors` file to write; for a sharded base an `.index.json`, whose shards (of the base's names)
            go beside it, or one `.safetensors` file for all. Put in place when whole, the index last.
        progress: called with the bytes written, and those of the whole, after each tensor.

    Raises:
        AdapterFileError: a damaged base or index; an adapter that does not fit it.
        ValueError: a W' that is not finite; out in place of the base.
    """
    entries, metadata = _entries(base)
    plan = _plan(entries, adapter, source)
    files = {entry.file for entry in entries.values()}
    sharded = out.name.endswith(_INDEX)
    if sharded and not base.name.endswith(_INDEX):
        raise ValueError(f"The base is one file, and so is what is written; found {out} for it, an index.")
    targets = {file: out.parent / file.name for file in files} if sharded else dict.fromkeys(files, out)
    taken = {path.resolve() for path in (base, *files)} & {path.resolve() for path in (out, *targets.values())}
    if taken:
        raise ValueError(
            f"The base stays as it is; {format_names(map(str, taken))} would be written over. Choose another."
        )
    total, done = sum(entry.bytes for entry in plan.values()), 0
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file in files}
        out.parent.mkdir(parents=True, exist_ok=True)
        for target in sorted(set(targets.values())):
            # As safetensors orders them: the widest dtype first, so that all are aligned, then by name.
            keys = sorted(
                (key for key, entry in plan.items() if targets[entry.file] == target),
                key=lambda key: (-_size(plan[key].dtype), key),
            )

            def fill(file: BinaryIO, keys: list[str] = keys) -> None:
                nonlocal done
                file.write(_header({key: plan[key] for key in keys}, metadata))
                for key in keys:
                    file.write(_bytes(_tensor(key, entries, adapter, source, opened)))
                    done += plan[key].bytes
                    if progress is not None:
                        progress(done, total)

            replace_file(target, fill)
        if sharded:
            weight_map = {key: entry.file.name for key, entry in sorted(plan.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            replace_file(out, lambda file: file.write(json.dumps(index, indent=2).encode()))


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Key to shape of every tensor of a checkpoint, sharded or not."""
    return {key: entry.shape for key, entry in _entries(base)[0].items()}


def _entries(base: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Key to entry of every tensor of the base, and its metadata."""
    files = [base]
    if base.name.endswith(_INDEX):
        index = parse_json(base.read_bytes(), base)
        held = cast("dict[str, Any]", index if isinstance(index, dict) else {}).get("weight_map")
        names = set(cast("dict[str, Any]", held if isinstance(held, dict) else {}).values())
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise AdapterFileError(f"{base} must name shards in its own folder; found {format_names(map(str, names))}.")
        files = [base.parent / name for name in sorted(names)]
    entries: dict[str, _Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        with _open(file) as opened:
            metadata |= opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(key)
                shape = tuple(part.get_shape())
                if key in entries:
                    raise AdapterFileError(f"{key!r} is in two shards of {base}: {entries[key].file} and {file}.")
                entries[key] = _Entry(file, part.get_dtype(), shape, _size(part.get_dtype()) * _count(shape))
    return entries, metadata


def _plan(entries: dict[str, _Entry], adapter: AdapterSpec, source: object) -> dict[str, _Entry]:
    """Key to entry of every tensor of the merged checkpoint; everything that can be checked without a tensor, is."""
    plan = dict(entries)
    missing = [join(path, "weight") for path in adapter.layers if join(path, "weight") not in entries]
    missing += [join(path, n) for path, names in adapter.heads.items() for n in names if join(path, n) not in entries]
    if missing:
        raise AdapterFileError(
            f"An adapter is merged into the checkpoint of the model that it was attached to; {source} adapts "
            f"{format_names(missing)}, which the base does not have. It has {format_names(entries)}."
        )
    for path, layer in adapter.layers.items():
        weight = entries[join(path, "weight")]
        if weight.dtype not in _DTYPES or len(weight.shape) != 2:
            raise AdapterFileError(f"{join(path, 'weight')!r} of the base is {weight.dtype} {weight.shape}, no weight.")
        _adapted(path, layer, adapter, source, *_skeleton(path, entries))
        if _creates_bias(path, layer, entries):
            size = weight.shape[0]
            plan[join(path, "bias")] = _Entry(weight.file, weight.dtype, (size,), size * _size(weight.dtype))
    return plan


def _skeleton(path: str, entries: dict[str, _Entry]) -> tuple[Tensor, Tensor | None]:
    weight, bias = entries[join(path, "weight")], entries.get(join(path, "bias"))
    made = [None if e is None else torch.empty(e.shape, dtype=_DTYPES[e.dtype], device="meta") for e in (weight, bias)]
    return cast("Tensor", made[0]), made[1]


def _creates_bias(path: str, layer: LayerSpec, entries: dict[str, _Entry]) -> bool:
    wants = any(layer.config.forms[name] != "none" for name in "CE")
    return join(path, "bias") not in entries and wants


def _adapted(
    path: str, layer: LayerSpec, adapter: AdapterSpec, source: object, weight: Tensor, bias: Tensor | None
) -> nn.Linear:
    """A layer alone, with its part of the adapter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    keys = [key for key in layer.tensors() if join(path, key) in adapter.tensors]
    own = {key: adapter.tensors[join(path, key)] for key in keys}
    return attach_spec(linear, AdapterSpec({"": layer}, {}, own), f"{source} at {path!r}")


def _tensor(
    key: str,
    entries: dict[str, _Entry],
    adapter: AdapterSpec,
    source: object,
    opened: dict[Path, Any],
) -> Tensor:
    """A tensor of the merged checkpoint."""

    def load(name: str) -> Tensor | None:
        return None if name not in entries else opened[entries[name].file].get_tensor(name)

    path, _, name = key.rpartition(".")
    if name in adapter.heads.get(path, ()):
        return adapter.tensors[key].to(cast("Tensor", load(key)).dtype)
    layer = adapter.layers.get(path)
    if layer is None or name not in ("weight", "bias"):
        return cast("Tensor", load(key))
    bias = load(join(path, "bias"))
    others: dict[str, Any] = dict.fromkeys(BIAS_PATHS if name == "weight" else WEIGHT_PATHS, "none")
    if bias is None and layer.bias is None:
        others["D"] = "none"  # it scales a bias that is not there
    own = replace(layer, config=replace(layer.config, **others))
    if set(own.config.forms.values()) == {"none"}:
        return cast("Tensor", load(key))
    merged = merge(_adapted(path, own, adapter, source, cast("Tensor", load(join(path, "weight"))), bias))
    return merged.weight if name == "weight" else merged.bias


@contextmanager
def _open(file: Path) -> Generator[Any]:
    safetensors = import_optional("safetensors")
    if not file.exists():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    try:
        opened = safetensors.safe_open(os.fspath(file), framework="pt")
    except Exception as error:  # whatever the parser makes of damaged bytes
        raise AdapterFileError(f"{file} is no whole safetensors file ({error}).") from error
    with opened as entered:
        yield entered


def _header(entries: dict[str, _Entry], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for key, entry in entries.items():
        header[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (at, at + entry.bytes)}
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> Any:
    return memoryview(cast("Any", tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))


def _size(dtype: str) -> int:
    """Bytes of one number, from the width in safetensors' name of its dtype."""
    if dtype in ("BOOL", "U8", "I8") or dtype.startswith("F8"):
        return 1
    return int("".join(c for c in dtype if c.isdigit())) // 8


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
