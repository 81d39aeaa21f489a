"""Merging an adapter into a checkpoint, tensor by tensor, without the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from glora.config import BIAS_PATHS, WEIGHT_PATHS
from glora.files.container import parse_json, plain_tensors, read_header, replace_files
from glora.fingerprint import agrees
from glora.matrices import LINEAR
from glora.model.attach import attach_spec
from glora.model.merge import merge
from glora.spec import (
    AdapterFileError,
    AdapterSpec,
    LayerSpec,
    TensorSpec,
    join,
    mismatches,
    report_other_base,
    tied_names,
)
from glora.text import format_names, format_problems

# Note [One tensor at a time]
# safetensors writes a file from tensors that are all in memory. A checkpoint may be larger than memory, so the file is
# written here: its header first (eight bytes of length, JSON, padding to eight), which the base's headers and the
# adapter's description determine, then each tensor as it is computed. A layer is merged as a model of that layer by
# `attach_spec` and `merge`, so that every bit is what they make of it: for its weight with A and B alone, for its
# bias with C, D and E alone (C needs W0, which is then read once more). What no adapter touches is copied as bytes,
# so that it may be of any dtype, of those that torch does not know too.

_INDEX = ".index.json"
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGER = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES = _FLOATING | _INTEGER | {"BOOL": torch.bool}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the base, or of the output.

    Attributes:
        file: the file that it is in; of a created bias, the file that its layer's weight is in.
        dtype: as safetensors names it.
        start: where its bytes begin in the file.
        bytes: how many there are.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    def read(self) -> bytearray:
        data = bytearray(self.bytes)
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            if opened.readinto(data) != self.bytes:
                raise AdapterFileError(f"{self.file} ends before the tensors that its header names; it is damaged.")
        return data

    def tensor(self) -> Tensor:
        return torch.frombuffer(self.read(), dtype=_DTYPES[self.dtype]).reshape(self.shape)

    def without_data(self) -> Tensor:
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")


def merge_checkpoint(
    base: Path,
    adapter: AdapterSpec,
    source: object,
    out: Path,
    progress: Callable[[int, int], object] | None = None,
    *,
    strict: bool = False,
) -> None:
    """Bake an adapter into a checkpoint: the same bits as `glora.merge` on the model, and then saving it.

    Args:
        base: a `.safetensors` file, or the `.safetensors.index.json` of a sharded one. It is not changed.
        adapter: the adapter; its layers are the checkpoint's keys without `.weight`.
        source: the adapter's file, for messages.
        out: the `.safetensors` file to write; for a sharded base an `.index.json`, whose shards (of the base's names)
            go beside it, or one `.safetensors` file for all. Put in place when all of it is whole, the index last.
        progress: called with the bytes written, and those of the whole, after each tensor.
        strict: whether another base than the adapter was trained beside is an error, or a warning.

    Raises:
        AdapterFileError: a damaged base or index; an adapter that does not fit it, or of another base (`strict`).
        ValueError: a W' that is not finite; out in place of the base.
        FileNotFoundError: no base.
    """
    entries, metadata, of_index = _read_base(base)
    plan = _plan(entries, adapter, source)
    files = sorted({entry.file for entry in entries.values()})
    sharded = out.name.endswith(_INDEX)
    if sharded and not base.name.endswith(_INDEX):
        raise ValueError(f"The base is one file, and so is what is written; found {out} for it, an index.")
    targets = {file: out.parent / file.name for file in files} if sharded else dict.fromkeys(files, out)
    taken = {path.resolve() for path in (base, *files)} & {path.resolve() for path in (out, *targets.values())}
    if taken:
        raise ValueError(
            f"The base stays as it is; {format_names(map(str, taken))} would be written over. Choose another."
        )
    owners = {key: path for path, layer in adapter.layers.items() for key in _keys(path, layer)}
    total, done = sum(entry.bytes for entry in plan.values()), 0
    others: list[str] = []

    def check(key: str, tensor: Tensor) -> None:
        if key in adapter.base and not agrees(tensor, adapter.base[key]):
            others.append(key)

    def fill(target: Path, file: BinaryIO) -> None:
        nonlocal done
        shard = {key: entry for key, entry in plan.items() if targets[entry.file] == target}
        # As safetensors orders them: the widest dtype first, so that all are aligned, then by name.
        keys = sorted(shard, key=lambda key: (-_bits(shard[key].dtype), key))
        file.write(_header({key: shard[key] for key in keys}, metadata))
        for key in keys:
            file.write(_merged(key, entries, adapter, owners, source, check))
            done += shard[key].bytes
            if progress is not None:
                progress(done, total)
        if done == total:  # the last of the files, and none is in its place yet
            report_other_base(others, source, strict=strict, stacklevel=4)

    contents: dict[Path, Any] = {target: partial(fill, target) for target in targets.values()}
    if sharded:
        weight_map = {key: entry.file.name for key, entry in sorted(plan.items())}
        index = {"metadata": {**of_index, "total_size": total}, "weight_map": weight_map}
        contents[out] = json.dumps(index, indent=2).encode()
    replace_files(contents)


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Key to shape of every tensor of a checkpoint, sharded or not."""
    return {key: entry.shape for key, entry in _read_base(base)[0].items()}


def _read_base(base: Path) -> tuple[dict[str, _Entry], dict[str, str], dict[str, Any]]:
    """Key to entry of every tensor of a checkpoint; the metadata of its files, and those of its index."""
    files, named, of_index = [base], dict[str, str](), dict[str, Any]()
    if base.name.endswith(_INDEX):
        raw = parse_json(base.read_bytes(), base)
        index = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
        held, said = index.get("weight_map"), index.get("metadata")
        named = cast("dict[str, str]", held if isinstance(held, dict) else {})
        of_index = cast("dict[str, Any]", said if isinstance(said, dict) else {})
        of_index.pop("total_parameters", None)  # a created bias adds to it
        names = list(named.values())
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):  # pyright: ignore
            raise AdapterFileError(f"{base} must name shards in its own folder; found {format_names(map(str, names))}.")
        files = [base.parent / name for name in sorted(set(names))]
    entries, metadata = dict[str, _Entry](), dict[str, str]()
    for file in files:
        header, start = read_header(file)
        metadata |= header.pop("__metadata__", None) or {}
        for key, field in header.items():
            if key in entries:
                raise AdapterFileError(f"{key!r} is in two shards of {base}: {entries[key].file} and {file}.")
            first, end = field["data_offsets"]
            entries[key] = _Entry(file, field["dtype"], tuple(field["shape"]), start + first, end - first)
    astray = [k for k, name in named.items() if k not in entries or entries[k].file.name != name]
    if astray:
        raise AdapterFileError(f"{base} names {format_names(astray)} in shards that do not have them; it is damaged.")
    return entries, metadata, of_index


def _plan(entries: Mapping[str, _Entry], adapter: AdapterSpec, source: object) -> dict[str, _Entry]:
    """Key to entry of every tensor of the merged checkpoint; everything that can be checked without a tensor, is."""
    plan = dict(entries)
    missing = [key for path, layer in adapter.layers.items() if (key := _keys(path, layer)[0]) not in entries]
    missing += [join(path, n) for path, names in adapter.heads.items() for n in names if join(path, n) not in entries]
    if missing:
        raise AdapterFileError(
            f"An adapter is merged into the checkpoint of the model that it was attached to; {source} adapts "
            f"{format_names(missing)}, which the base does not have. It has {format_names(entries)}."
        )
    problems = _misfits_of_heads(entries, adapter)
    for path, layer in adapter.layers.items():
        (weight_key, bias_key), matrix = _keys(path, layer), layer.matrix or LINEAR
        weight, bias = entries[weight_key], entries.get(bias_key)
        if weight.dtype not in _FLOATING or len(weight.shape) != len(matrix.axes):
            problems.append(f"{weight_key!r} of the base is {weight.dtype} {weight.shape}, no weight")
            continue
        outputs = tuple(matrix.read(weight.without_data()).shape[:-1])
        if bias is not None and (bias.dtype not in _FLOATING or bias.shape != outputs):
            problems.append(f"{bias_key!r} of the base is {bias.dtype} {bias.shape}, no bias")
            continue
        _attach(path, layer, adapter, source, weight.without_data(), bias and bias.without_data())
        if bias is None and any(layer.config.forms[name] != "none" for name in "CE"):
            size = math.prod(outputs) * weight.bytes // math.prod(weight.shape)
            plan[bias_key] = replace(weight, shape=outputs, start=0, bytes=size)
    if problems:
        raise AdapterFileError(
            f"An adapter must fit the checkpoint that it is merged into; {source} does not, and nothing was written. "
            f"Found: {format_problems(problems)}. Take the checkpoint of the model that it was trained on."
        )
    return plan


def _misfits_of_heads(entries: Mapping[str, _Entry], adapter: AdapterSpec) -> list[str]:
    """Why heads cannot take the place of the base's modules."""
    problems: list[str] = []
    owned: dict[str, set[str]] = {}
    for key in entries:
        owned.setdefault(key.rpartition(".")[0], set()).add(key.rpartition(".")[2])
    for path, names in adapter.heads.items():
        tied = owned[path].intersection(tied_names(adapter.ties, path))  # in the base once, as a rule
        if {*names, *tied} != owned[path]:
            problems.append(f"{path!r}: tensors {sorted(names)} where the base has {sorted(owned[path])}")
        else:
            replaced = {join(path, name): entries[join(path, name)] for name in names}
            unknown = [f"{key!r} of the base is {e.dtype}" for key, e in replaced.items() if e.dtype not in _DTYPES]
            wanted = {key: TensorSpec(e.shape, e.dtype in _FLOATING) for key, e in replaced.items()}
            problems += unknown or mismatches(adapter.tensors, wanted, strict=False)
    for key, owner in adapter.ties.items():
        if key in entries and entries[key].shape != tuple(adapter.tensors[owner].shape):
            problems.append(f"{key!r} of the base is {entries[key].shape}, and tied to {owner!r}, which is not")
    return problems


def _keys(path: str, layer: LayerSpec) -> tuple[str, str]:
    """The base's keys of a layer's weight and bias; the latter empty where it can have none."""
    matrix = layer.matrix or LINEAR
    owner = matrix.module_path(path)
    return join(owner, matrix.weight), join(owner, matrix.bias) if matrix.bias is not None else ""


def _attach(
    path: str, layer: LayerSpec, adapter: AdapterSpec, source: object, weight: Tensor, bias: Tensor | None
) -> nn.Module:
    """A layer alone, with its part of the adapter."""
    matrix = layer.matrix or LINEAR
    module = nn.Linear(1, 1, device="meta") if matrix.is_linear else nn.Module()
    module.register_parameter(matrix.weight, nn.Parameter(weight, requires_grad=False))
    if matrix.bias is not None:
        held = None if bias is None else nn.Parameter(bias, requires_grad=False)
        module.register_parameter(matrix.bias, held)
    alone = matrix.path("")
    keys = [key for key in layer.tensors() if join(path, key) in adapter.tensors]
    own = {join(alone, key): adapter.tensors[join(path, key)] for key in keys}
    return attach_spec(module, AdapterSpec({alone: layer}, {}, own), f"{source} at {path!r}")


def _merged(
    key: str,
    entries: Mapping[str, _Entry],
    adapter: AdapterSpec,
    owners: Mapping[str, str],
    source: object,
    check: Callable[[str, Tensor], None],
) -> bytearray | memoryview:
    """The bytes of a tensor of the merged checkpoint.

    Args:
        owners: key to path, for the tensors of adapted layers.
        check: sees each frozen tensor of an adapted layer.
    """
    head, _, name = key.rpartition(".")
    key_of_head = adapter.ties.get(key, key if name in adapter.heads.get(head, ()) else None)
    if key_of_head is not None:
        return _bytes(adapter.tensors[key_of_head].to(_DTYPES[entries[key].dtype]))
    path = owners.get(key)
    if path is None:
        return entries[key].read()
    layer = adapter.layers[path]
    weight_key, bias_key = _keys(path, layer)
    held = entries[key].tensor() if key in entries else None  # a created bias is not there
    if held is not None:
        check(key, held)
    others: dict[str, Any] = dict.fromkeys(BIAS_PATHS if key == weight_key else WEIGHT_PATHS, "none")
    has_bias = bias_key in entries
    if not has_bias and layer.bias is None:
        others["D"] = "none"  # it scales a bias that is not there
    own = replace(layer, config=replace(layer.config, **others))
    if held is not None and not own.config.paths:
        return _bytes(held)
    weight = held if key == weight_key and held is not None else entries[weight_key].tensor()
    bias = held if key == bias_key else entries[bias_key].tensor() if has_bias else None
    module = _attach(path, own, adapter, source, weight, bias)
    try:
        merged = merge(module)
    except ValueError as error:  # which names the layer as a model
        raise ValueError(f"{key!r} of the base, with {source}: {error}") from error
    return _bytes(cast("Tensor", merged._parameters[name]))


def _header(entries: Mapping[str, _Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for key, entry in entries.items():
        header[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (at, at + entry.bytes)}
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    plain = plain_tensors({"": tensor})[""]
    return memoryview(cast("Any", plain.reshape(-1).view(torch.uint8).numpy()))


def _bits(dtype: str) -> int:
    """The bits of one number, from safetensors' name of its dtype, as `F8_E4M3`."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8  # BOOL
