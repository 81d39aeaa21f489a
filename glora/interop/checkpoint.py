"""The base of an adapter that is converted without its model: transformers' model of a folder, or a file's tensors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from glora.files.checkpoint import checkpoint_tensors
from glora.files.container import import_optional, parse_json, parsing
from glora.fingerprint import agrees
from glora.interop.base import Base, base_of
from glora.matrices import LINEAR, convolution
from glora.model.walk import Site, owners, site_of
from glora.spec import AdapterSpec, report_other_base
from glora.text import format_problems

# Note [Bases without a model]
# A checkpoint's file has names and shapes, and no kinds of modules. Weights of two axes are taken as nn.Linear's (an
# embedding's is the same matrix), or as a glora file says that they are held; those of three to five axes as a
# convolution's, for LyCORIS's files alone, which ask for no more than the shape. Groups of a convolution, the order of
# an expert's parameters, Conv1D's transposed weights in PEFT's files are told by the model alone, and refused by name
# without it. A folder with a `config.json` has the model: transformers builds it. The tensors are mapped from the file,
# and read where they are used.
CONFIG = "config.json"
_KINDS = {2: LINEAR, **{axes + 2: convolution(axes) for axes in (1, 2, 3)}}


def base_at(path: Path, *, convolutions: bool = False) -> Base:
    """The base of a checkpoint (Note [Bases without a model]).

    Args:
        path: transformers' folder of a model, or a `.safetensors` file, the `.index.json` of several, or their folder.
        convolutions: whether weights of three axes and more are convolutions'.

    Raises:
        FileNotFoundError: there is none.
        AdapterFileError: a damaged one.
        ValueError: a folder of a model that transformers does not have.
    """
    if (path / CONFIG).is_file():
        return base_of(_model(path))
    model = nn.Module()
    for key, tensor in checkpoint_tensors(path).items():
        _put(model, key, tensor)
    known = {owner.path: owner for owner in owners(model)}
    sites: dict[str, Site] = {}
    for module, owner in known.items():
        weight = owner.tensors.get("weight")
        axes = 0 if weight is None else weight.ndim
        if axes in _KINDS and (axes == 2 or convolutions):
            sites[module] = site_of(owner, _KINDS[axes])
    return Base(sites, known, model, partial=True)


@lru_cache(1)
def _model(folder: Path) -> nn.Module:
    """The model of a folder that transformers' `save_pretrained` wrote, or its hub has; no code of its own is run."""
    transformers = import_optional("transformers", "trainer")
    config = parse_json((folder / CONFIG).read_bytes(), folder / CONFIG)
    names: Any = cast("dict[str, Any]", config).get("architectures") if isinstance(config, dict) else None
    name: Any = cast("list[Any]", names)[0] if isinstance(names, list) and names else None
    kind: Any = getattr(transformers, str(name), None)
    if not hasattr(kind, "from_pretrained"):
        raise ValueError(
            f"A model's folder names a class of transformers as `architectures` in its {CONFIG}; {folder} has "
            f"{name!r}. Pass the checkpoint's file instead, or load the adapter into the model and save it from there."
        )
    with parsing(folder / CONFIG, "that of a model of transformers"):
        return kind.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)


def _put(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Register a tensor under its key; the modules on the way are made, whatever they are called."""
    *path, name = key.split(".")
    for part in path:
        child = model._modules.get(part) or nn.Module()
        model._modules[part] = child
        model = child
    if tensor.is_floating_point():
        model._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        model._buffers[name] = tensor


def fitted(base: Base, adapter: AdapterSpec, source: object) -> Base:
    """The base as an adapter's layers are held in it.

    Args:
        base: of a checkpoint or model.
        adapter: what is computed beside it.
        source: its file, for messages.

    Raises:
        ValueError: layers that the base does not have, or has of other sizes.

    Warns:
        UserWarning: it is another base than the adapter was trained beside.
    """
    sites, problems, differing = dict(base.sites), list[str](), list[str]()
    for path, layer in adapter.layers.items():
        if base.partial and path in sites and layer.matrix is not None and layer.matrix.weight == "weight":
            weight = sites[path].owner.tensors["weight"]
            if weight.ndim == len(layer.matrix.axes) and not layer.batch:
                sites[path] = site_of(sites[path].owner, layer.matrix)
        site = sites.get(path)
        module = layer.matrix.module_path(path) if layer.matrix is not None else path
        if site is None and module not in base.owners:
            problems.append(f"no {path!r}")
        elif site is not None:
            shape = tuple(site.weight.shape[-2:])
            wanted = layer.out_features, layer.in_features
            if any(want not in (None, size) for want, size in zip(wanted, shape, strict=True)):
                problems.append(f"{path!r} of {shape} where {wanted} is adapted")
    if problems:
        raise ValueError(
            f"An adapter is converted beside the base that it was trained on; for {source} the given one has "
            f"{format_problems(problems)}. Nothing was written."
        )
    for key, known in adapter.base.items():
        module, _, name = key.rpartition(".")
        tensor = base.owners[module].tensors.get(name) if module in base.owners else None
        if tensor is not None and not agrees(tensor, known):
            differing.append(key)
    report_other_base(differing, source, strict=False, stacklevel=3)
    return base._replace(sites=sites)
