"""Merging an adapter into a checkpoint, tensor by tensor, without the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from glora.config import BIAS_PATHS, WEIGHT_PATHS
from glora.files.container import (
    bytes_of,
    import_optional,
    parse_json,
    parsing,
    plain_tensors,
    read_header,
    replace_files,
)
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
)
from glora.text import format_names, format_problems

# Note [One tensor at a time]
# safetensors writes a file from tensors that are all in memory. A checkpoint may be larger than memory, so the file is
# written here: its header first (eight bytes of length, JSON, padding to eight), which follows from the base's headers
# and the adapter's description, then each tensor as it is computed. A layer is merged by `attach_spec` and `merge`, as
# a model of that layer alone, so that the bits are theirs: its weight with A and B alone, its bias with C, D and E
# alone (C needs W0, which is then read once more). What no adapter touches is copied as bytes, also in dtypes that
# torch does not know.

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
        base: a `.safetensors` file, the `.safetensors.index.json` of a sharded one, or the folder of either. It is not
            changed.
        adapter: the adapter; its layers are the checkpoint's keys without `.weight`, or differ from them by one
            component in front (Note [Backbones]).
        source: the adapter's file, for messages.
        out: the `.safetensors` file to write; for a sharded base an `.index.json`, whose shards (of the base's names)
            go beside it, or one `.safetensors` file for all. Put in place once all files are complete, the index last.
        progress: called with the bytes written so far, and with those in all, after each tensor.
        strict: whether a base other than the one that the adapter was trained on is an error, or a warning.

    Raises:
        AdapterFileError: a damaged base or index; an adapter that does not fit it, or of another base (`strict`).
        ValueError: a W' that is not finite; out in place of the base.
        FileNotFoundError: no base.
    """
    base = checkpoint_file(base)
    entries, metadata, index_metadata = _read_base(base)
    merging = _Merging(entries, as_in_checkpoint(adapter, entries), source)
    plan = merging.plan()
    files = sorted({entry.file for entry in entries.values()})
    sharded = out.name.endswith(_INDEX)
    if sharded and not base.name.endswith(_INDEX):
        raise ValueError(f"A base of one file is merged into one file; found {out}, an index.")
    targets = {file: out.parent / file.name for file in files} if sharded else dict.fromkeys(files, out)
    overwritten = {path.resolve() for path in (base, *files)} & {path.resolve() for path in (out, *targets.values())}
    if overwritten:
        raise ValueError(
            f"The base stays as it is; {format_names(map(str, overwritten))} would be written over. Choose another out."
        )
    total, done = sum(entry.bytes for entry in plan.values()), 0

    def fill(target: Path, file: BinaryIO) -> None:
        nonlocal done
        shard = {key: entry for key, entry in plan.items() if targets[entry.file] == target}
        # As safetensors orders them: the widest dtype first, so that all are aligned, then by name.
        keys = sorted(shard, key=lambda key: (-_bits(shard[key].dtype), key))
        file.write(_header({key: shard[key] for key in keys}, metadata))
        for key in keys:
            file.write(merging.merged(key))
            done += shard[key].bytes
            if progress is not None:
                progress(done, total)
        if done == total:  # the last of the files, and none is in place yet
            absent = [key for key in merging.adapter.outside if key not in entries]  # a head that was new, say
            report_other_base([*merging.differing, *absent], source, strict=strict, stacklevel=4)

    contents: dict[Path, Any] = {target: partial(fill, target) for target in targets.values()}
    if sharded:
        weight_map = {key: entry.file.name for key, entry in sorted(plan.items())}
        index = {"metadata": {**index_metadata, "total_size": total}, "weight_map": weight_map}
        contents[out] = json.dumps(index, indent=2).encode()
    replace_files(contents)


def frozen_tensors(base: Path, adapter: AdapterSpec, source: object) -> Iterator[tuple[Tensor, Tensor | None]]:
    """W0 as a matrix and b0 of each layer of an adapter, in order, from a checkpoint; one layer is read at a time.

    Raises:
        AdapterFileError: as `merge_checkpoint`, before the first.
    """
    entries, _, _ = _read_base(base)
    adapter = as_in_checkpoint(adapter, entries)
    _Merging(entries, adapter, source).plan()
    for path, layer in adapter.layers.items():
        weight, bias = [entries[key].tensor() if key in entries else None for key in _keys(path, layer)]
        yield (layer.matrix or LINEAR).read(cast("Tensor", weight)), bias


# Note [Backbones]
# A model with a head (`BertForSequenceClassification`) holds its backbone as one attribute, `bert.encoder`, and reads
# checkpoints of the backbone alone, whose keys have no `bert.`; a backbone reads those of the whole. So where a
# checkpoint does not have an adapter's keys, and has all of the layers' with one component more in front of each, or
# one less, and the same for all, the adapter goes there. What is outside of the backbone (a head) must be there too.
def as_in_checkpoint(adapter: AdapterSpec, keys: Collection[str]) -> AdapterSpec:
    """The adapter with the keys that a checkpoint has for its layers; as it is where the two do not meet."""
    weights = [_keys(path, layer)[0] for path, layer in adapter.layers.items()]
    rename = renaming(weights, keys)
    return adapter if rename is str else adapter.renamed(rename)


def renaming(weights: Collection[str], keys: Collection[str]) -> Callable[[str], str]:
    """From a model's keys to a checkpoint's, by these of its weights (Note [Backbones]); to themselves as a rule."""
    if not weights or not all("." in key for key in weights) or any(key in keys for key in weights):
        return str
    fronts = {key.partition(".")[0] for key in weights}
    renames: list[Callable[[str], str]] = [partial(join, front) for front in {key.partition(".")[0] for key in keys}]
    renames += [partial(_without, f"{front}.") for front in fronts if len(fronts) == 1]
    fitting = [rename for rename in renames if all(rename(key) in keys for key in weights)]
    return fitting[0] if len(fitting) == 1 else str


def _without(front: str, key: str) -> str:
    return key.removeprefix(front)


def _why_missing(missing: Iterable[str], keys: Iterable[str]) -> str:
    """A word on experts, which transformers writes one by one."""
    apart = next((key for key in keys if re.search(r"\.experts\.\d+\.", key)), None)
    if apart is None or not any(".experts." in key for key in missing):
        return ""
    return f"The base has each expert's matrices apart ({apart!r}), where the model holds those of all in one tensor. "


def checkpoint_readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    """Key to a function that reads the tensor, of a checkpoint's file, of its index, or of a folder with either.

    Raises:
        FileNotFoundError: there is none.
        AdapterFileError: a damaged one, or a tensor of a dtype that torch does not know.
    """
    entries = _read_base(path)[0]
    unknown = [f"{key} ({entry.dtype})" for key, entry in entries.items() if entry.dtype not in _DTYPES]
    if unknown:
        raise AdapterFileError(f"Tensors must be of dtypes that torch knows; {path} has {format_names(unknown)}.")
    return {key: entry.tensor for key, entry in entries.items()}


def checkpoint_tensors(path: Path) -> dict[str, Tensor]:
    """Key to tensor of a checkpoint, as `checkpoint_readers`: mapped from the files, and read where they are used."""
    load_file = import_optional("safetensors.torch").load_file
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(entry.file for entry in _read_base(path)[0].values()):
        with parsing(file):
            tensors |= load_file(file)
    return tensors


def checkpoint_file(path: Path) -> Path:
    """The file of a checkpoint, or the index of several, where a folder is given; else the path itself.

    Raises:
        FileNotFoundError: the folder has none, or more than one.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*.safetensors{_INDEX}")) or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"A checkpoint's folder has one .safetensors file, or one {_INDEX} of several; found "
            f"{format_names(file.name for file in found) or 'none'} in {str(path)!r}."
        )
    return found[0]


def _read_base(base: Path) -> tuple[dict[str, _Entry], dict[str, str], dict[str, Any]]:
    """Key to entry of every tensor of a checkpoint; the metadata of its files, and those of its index."""
    base = checkpoint_file(base)
    weight_map, index_metadata = _read_index(base) if base.name.endswith(_INDEX) else ({}, {})
    entries, metadata = dict[str, _Entry](), dict[str, str]()
    for file in [base.parent / name for name in sorted(set(weight_map.values()))] or [base]:
        header = read_header(file)
        metadata |= header.metadata
        for key, tensor in header.tensors.items():
            if key in entries:
                raise AdapterFileError(f"{key!r} is in two shards of {base}: {entries[key].file} and {file}.")
            first, end = tensor["data_offsets"]
            entries[key] = _Entry(file, tensor["dtype"], tuple(tensor["shape"]), header.start + first, end - first)
    wrong = [key for key, name in weight_map.items() if key not in entries or entries[key].file.name != name]
    if wrong:
        raise AdapterFileError(f"{base} names {format_names(wrong)} in shards that do not have them; it is damaged.")
    return entries, metadata, index_metadata


def _read_index(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Key to the name of its shard, and the metadata of an index."""
    raw = parse_json(file.read_bytes(), file)
    index = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
    values = [index.get(name) for name in ("weight_map", "metadata")]
    weight_map, metadata = (cast("dict[str, Any]", value if isinstance(value, dict) else {}) for value in values)
    metadata.pop("total_parameters", None)  # a created bias adds to it
    names = list(weight_map.values())
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise AdapterFileError(f"{file} must name shards in its own folder; found {format_names(map(str, names))}.")
    return weight_map, metadata


@dataclass(frozen=True)
class _Merging:
    """An adapter on its way into a checkpoint.

    Attributes:
        entries: key to entry of the base's tensors.
        adapter: what is merged.
        source: its file, for messages.
        differing: keys of frozen tensors that are not those which the adapter was trained on, as far as they were read.
    """

    entries: Mapping[str, _Entry]
    adapter: AdapterSpec
    source: object
    differing: list[str] = field(default_factory=list[str])

    @cached_property
    def path_of(self) -> dict[str, str]:
        """Key to path, for the tensors of adapted layers."""
        return {key: path for path, layer in self.adapter.layers.items() for key in _keys(path, layer)}

    @cached_property
    def replacements(self) -> dict[str, Tensor]:
        """Key of the base to the head's tensor that replaces it; a tied key is replaced by what it is tied to."""
        source_of = {key: key for key in self.adapter.copies()}
        source_of |= {key: owner for key, owner in self.adapter.ties.items() if key in self.entries}
        return {key: self.adapter.tensors[source] for key, source in source_of.items()}

    def plan(self) -> dict[str, _Entry]:
        """Key to entry of every tensor of the merged checkpoint; all is checked that can be without tensors."""
        entries, layers, plan = self.entries, self.adapter.layers, dict(self.entries)
        weight_keys = [_keys(path, layer)[0] for path, layer in layers.items()]
        missing = [key for key in (*weight_keys, *self.replacements) if key not in entries]
        if missing:
            raise AdapterFileError(
                f"An adapter is merged into the checkpoint of the model that it was attached to; {self.source} adapts "
                f"{format_names(missing)}, which the base does not have. It has {format_names(entries)}. "
                f"{_why_missing(missing, entries)}Merge in the model instead, which knows its checkpoint's names: "
                f"glora.load the adapter into it, and inside `with glora.merged(model):` call model.save_pretrained."
            )
        problems = self._unfit_heads()
        for path, layer in layers.items():
            (weight_key, bias_key), matrix = _keys(path, layer), layer.matrix or LINEAR
            weight, bias = entries[weight_key], entries.get(bias_key)
            if weight.dtype not in _FLOATING or len(weight.shape) != len(matrix.axes):
                problems.append(f"{weight_key!r} of the base is {weight.dtype} {weight.shape}, no weight")
                continue
            outputs = tuple(matrix.read(weight.without_data()).shape[:-1])
            if bias is not None and (bias.dtype not in _FLOATING or bias.shape != outputs):
                problems.append(f"{bias_key!r} of the base is {bias.dtype} {bias.shape}, no bias")
                continue
            self._attach(path, layer, weight.without_data(), bias and bias.without_data())
            if bias is None and not {"C", "E"}.isdisjoint(layer.config.paths):
                size = math.prod(outputs) * weight.bytes // math.prod(weight.shape)
                plan[bias_key] = replace(weight, shape=outputs, start=0, bytes=size)
        if problems:
            raise AdapterFileError(
                f"An adapter must fit the checkpoint that it is merged into; {self.source} does not, and nothing was "
                f"written. Found: {format_problems(problems)}. Take the checkpoint of the model that it was trained on."
            )
        return plan

    def _unfit_heads(self) -> list[str]:
        """Why heads cannot replace all tensors of the base's modules, and what is tied to them."""
        heads, new = self.adapter.heads, self.replacements
        old = {key: e for key, e in self.entries.items() if key in new or key.rpartition(".")[0] in heads}
        unknown = [f"{key!r} of the base is {entry.dtype}" for key, entry in old.items() if entry.dtype not in _DTYPES]
        return unknown or list(mismatches(new, {k: TensorSpec(e.shape, e.dtype in _FLOATING) for k, e in old.items()}))

    def merged(self, key: str) -> bytearray | memoryview:
        """The bytes of a tensor of the merged checkpoint."""
        entries, adapter = self.entries, self.adapter
        if key in self.replacements:
            return _bytes(self.replacements[key].to(_DTYPES[entries[key].dtype]))
        path = self.path_of.get(key)
        if path is None:
            return entries[key].read()
        tensors = {key: entries[key].tensor()} if key in entries else {}  # a created bias is not there
        if key in tensors and key in adapter.base and not agrees(tensors[key], adapter.base[key]):
            self.differing.append(key)
        layer = adapter.layers[path]
        weight_key, bias_key = _keys(path, layer)
        left_out: dict[str, Any] = dict.fromkeys(BIAS_PATHS if key == weight_key else WEIGHT_PATHS, "none")
        part = replace(layer, config=replace(layer.config, **left_out))
        if key in tensors and not part.config.paths:
            return _bytes(tensors[key])
        tensors |= {k: entries[k].tensor() for k in (weight_key, bias_key) if k != key and k in entries}
        module = self._attach(path, part, tensors[weight_key], tensors.get(bias_key))
        try:
            merge(module)
        except ValueError as error:  # which names the layer as a model
            raise ValueError(f"{key!r} of the base, with {self.source}: {error}") from error
        return _bytes(cast("Tensor", module._parameters[key.rpartition(".")[2]]))

    def _attach(self, path: str, layer: LayerSpec, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A layer alone, with its part of the adapter."""
        matrix, tensors = layer.matrix or LINEAR, self.adapter.tensors
        module = nn.Linear(1, 1, device="meta") if matrix.is_linear else nn.Module()
        module.register_parameter(matrix.weight, nn.Parameter(weight, requires_grad=False))
        if matrix.bias is not None:
            parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
            module.register_parameter(matrix.bias, parameter)
        root = matrix.path("")
        keys = [key for key in layer.tensors() if join(path, key) in tensors]
        values = {join(root, key): tensors[join(path, key)] for key in keys}
        return attach_spec(module, AdapterSpec({root: layer}, {}, values), f"{self.source} at {path!r}")


def _keys(path: str, layer: LayerSpec) -> tuple[str, str]:
    """The base's keys of a layer's weight and bias; the latter empty where it can have none."""
    matrix = layer.matrix or LINEAR
    module_path = matrix.module_path(path)
    return join(module_path, matrix.weight), join(module_path, matrix.bias) if matrix.bias is not None else ""


def _header(entries: Mapping[str, _Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for key, entry in entries.items():
        header[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, start + entry.bytes)}
        start += entry.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return bytes_of(plain_tensors({"": tensor})[""])


def _bits(dtype: str) -> int:
    """The bits of one number, from safetensors' name of its dtype, as `F8_E4M3`."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8  # BOOL
