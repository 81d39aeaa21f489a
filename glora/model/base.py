"""Which base an adapter was trained beside, and whether a model has it (Note [Fingerprints])."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor

from glora.fingerprint import Fingerprint, agrees, fingerprint
from glora.model.modules import NamedModule
from glora.model.planned import PlannedLayer
from glora.spec import AdapterFileError, join
from glora.text import format_names


def fingerprints(layer: NamedModule, *, created: Iterable[str]) -> dict[str, Fingerprint]:
    """Key to fingerprint of an adapted layer's frozen tensors: what adapters are on, and its weight and bias.

    Args:
        layer: the layer.
        created: names of its tensors that an adapter has brought along.
    """
    names = {"weight", "bias", *layer.adapters} - {*created}
    tensors = {name: tensor for name, tensor in layer.tensors.items() if name in names}
    found = {join(layer.path, name): fingerprint(tensor) for name, tensor in tensors.items()}
    return {key: known for key, known in found.items() if known is not None}


def check_base(
    layers: Iterable[PlannedLayer], known: Mapping[str, Fingerprint], source: object, *, strict: bool
) -> None:
    """Say which layers' frozen tensors are not those that the adapter was trained beside.

    Raises:
        AdapterFileError: there are some, and `strict`.
    """
    tensors = {join(layer.path, name): t for layer in layers for name, t in layer.named.tensors.items()}
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
