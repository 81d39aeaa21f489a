"""Which base an adapter was trained beside, and whether a model has it (Note [Fingerprints])."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor

from glora.fingerprint import Fingerprint, agrees, fingerprint
from glora.model.planned import PlannedLayer
from glora.model.walk import Site
from glora.spec import AdapterFileError, join
from glora.text import format_names


def fingerprints(at: Site) -> dict[str, Fingerprint]:
    """Key to fingerprint of an adapted matrix's frozen tensors: its weight, and its bias if it has one of its own."""
    names = [at.matrix.weight, *([at.matrix.bias] if at.matrix.bias is not None and at.has_own_bias else [])]
    found = {join(at.named.path, name): fingerprint(at.named.tensors[name]) for name in names}
    return {key: known for key, known in found.items() if known is not None}


def check_base(
    layers: Iterable[PlannedLayer], known: Mapping[str, Fingerprint], source: object, *, strict: bool
) -> None:
    """Say which layers' frozen tensors are not those that the adapter was trained beside.

    Raises:
        AdapterFileError: there are some, and `strict`.
    """
    tensors = {
        join(layer.at.matrix.module_path(layer.path), name): tensor
        for layer in layers
        for name, tensor in layer.named.tensors.items()
    }
    others = [key for key, tensor in tensors.items() if is_other(key, tensor, known)]
    report_other_base(others, source, strict=strict, stacklevel=4)


def is_other(key: str, tensor: Tensor, known: Mapping[str, Fingerprint]) -> bool:
    """Whether a frozen tensor has a fingerprint, and this one is another tensor."""
    return key in known and not agrees(tensor, known[key])


def report_other_base(keys: list[str], source: object, *, strict: bool, stacklevel: int) -> None:
    """Warn, or raise with `strict`, that these frozen tensors are not those that an adapter was trained beside."""
    if not keys:
        return
    message = (
        f"An adapter is a change of the very weights that it was trained beside; {source} was trained beside others "
        f"than this base has in {format_names(keys)}. Take the base that it was trained on. A head that was new to the "
        f"model then (random, and in no checkpoint) is lost: train it as a whole beside the adapter, with trainable=, "
        f"so that the adapter's file holds it."
    )
    if strict:
        raise AdapterFileError(f"{message} Nothing was changed; strict=False only warns.")
    warnings.warn(f"{message} strict=True makes this an error.", UserWarning, stacklevel=stacklevel + 1)
