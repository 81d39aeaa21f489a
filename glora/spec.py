"""An adapter apart from any model: its layers, its heads and its tensors, as files and other libraries know it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from glora.config import GLoRAConfig
from glora.fingerprint import Fingerprint
from glora.matrices import Matrix
from glora.precision import wide
from glora.text import format_names


class AdapterFileError(ValueError):
    """An adapter's file is damaged, foreign, or does not fit the model. The message names the file."""


class TensorSpec(NamedTuple):
    """What a tensor must be.

    Attributes:
        shape: its shape; None for a size, or for the whole shape, that is not known.
        floating: whether its dtype is a floating one; None where any is right (a complex one, say).
    """

    shape: tuple[int | None, ...] | None = None
    floating: bool | None = True


def like(tensor: Tensor) -> TensorSpec:
    """What a tensor must be to be written into this one."""
    return TensorSpec(tuple(tensor.shape), None if tensor.is_complex() else tensor.is_floating_point())


@dataclass(frozen=True)
class LayerSpec:
    """One adapted layer, or rather one adapted matrix of a module.

    Attributes:
        config: its forms as they are (`"none"` where there is no path), rank, alpha, product and the rest.
        out_features: rows of the base weight; None where the source does not say.
        in_features: columns of the base weight; None where the source does not say.
        bias: whether the base layer has a bias; None where the source does not say. Then a D without a bias to scale is
            left out, since it scales nothing.
        matrix: how the module holds it; None where the source does not say.
        batch: how many matrices the weight is a batch of, `(experts,)`; empty for one; None where the source does not
            say.
    """

    config: GLoRAConfig
    out_features: int | None = None
    in_features: int | None = None
    bias: bool | None = None
    matrix: Matrix | None = None
    batch: tuple[int, ...] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the weight is held as nn.Linear holds its own, as far as the source says."""
        return not self.batch and (self.matrix is None or self.matrix.is_linear)

    def tensors(self, paths: Iterable[str] | None = None) -> dict[str, TensorSpec]:
        """Key within the layer (`A.left`) to what the tensor must be, for these paths or for all.

        Example:
            >>> import glora
            >>> list(LayerSpec(glora.GLoRAConfig(A="vector")).tensors())
            ['A.value', 'B.left', 'B.right']
        """
        # Unknown sizes are passed as -1 and -2.
        shapes = self.config.shapes(self.out_features or -1, self.in_features or -2, paths, self.batch or ())
        return {key: TensorSpec(tuple([None if size < 0 else size for size in shape])) for key, shape in shapes.items()}

    @property
    def forms(self) -> str:
        """The forms of its paths as text, `A=lora B=vector`."""
        return " ".join(f"{path}={self.config.forms[path]}" for path in self.config.paths)

    @property
    def rank(self) -> int | None:
        """The rank; None where no path is low rank."""
        return self.config.rank if "lora" in self.config.forms.values() else None

    @property
    def parameters(self) -> int:
        """How many numbers its paths have; the sizes must be known."""
        tensors = self.tensors().items()
        return sum(math.prod(spec.shape or ()) for key, spec in tensors if key != "A.balance")  # pyright: ignore


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter: module path to layer, module path to the names of a head's tensors, and all tensors by their keys.

    Attributes:
        ties: key of a tensor to the key of the head's tensor that it is tied to, and reads (Note [Tied heads]).
        base: key to fingerprint of the frozen tensors that it changes; none where the source does not say.
        outside: key to fingerprint of the end of each other frozen tensor, a new head's above all; likewise.
        statistics: module path to the buffers that training has changed, and that belong to the adapter (Note [Running
            statistics]).
    """

    layers: Mapping[str, LayerSpec]
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    base: Mapping[str, Fingerprint] = field(default_factory=dict[str, Fingerprint], repr=False)
    outside: Mapping[str, Fingerprint] = field(default_factory=dict[str, Fingerprint], repr=False)
    statistics: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def wanted(self) -> dict[str, TensorSpec]:
        """Key to what the tensor must be, for every tensor that the layers and heads have."""
        wanted: dict[str, TensorSpec] = {}
        for path, layer in self.layers.items():
            prefix = join(path, "")
            wanted |= {prefix + key: spec for key, spec in layer.tensors().items()}
        return wanted | dict.fromkeys(self.copies(), TensorSpec(None, None))

    def copies(self) -> list[str]:
        """The keys of what it has whole in place of the base's: heads and running statistics."""
        return [join(path, n) for held in (self.heads, self.statistics) for path in held for n in held[path]]

    def folded(self) -> AdapterSpec:
        """The same adapter without balances (Note [Balance]): multiplied into A's left factors."""
        layers, tensors = dict(self.layers), dict(self.tensors)
        for path, layer in self.layers.items():
            if layer.config.is_balanced:
                layers[path] = replace(layer, config=replace(layer.config, balance="none"))
                left = wide(tensors[join(path, "A.left")])
                tensors[join(path, "A.left")] = left * tensors.pop(join(path, "A.balance"))
        return replace(self, layers=layers, tensors=tensors)

    def renamed(self, rename: Callable[[str], str]) -> AdapterSpec:
        """The same adapter on modules of other paths; `rename` goes from a path or key to the new one."""
        return AdapterSpec(
            {rename(path): layer for path, layer in self.layers.items()},
            {rename(path): names for path, names in self.heads.items()},
            {rename(key): tensor for key, tensor in self.tensors.items()},
            {rename(key): rename(owner) for key, owner in self.ties.items()},
            {rename(key): known for key, known in self.base.items()},
            {rename(key): known for key, known in self.outside.items()},
            statistics={rename(path): names for path, names in self.statistics.items()},
        )


def join(path: str, name: str) -> str:
    """`path.name`, and `name` alone at the root; with an empty name, what comes before a name."""
    return f"{path}.{name}" if path else name


def tied_names(ties: Mapping[str, str], path: str) -> list[str]:
    """Names of a module's tensors that are tied to a head's."""
    return [name for owner, _, name in (key.rpartition(".") for key in ties) if owner == path]


def differences(attached: AdapterSpec, file: AdapterSpec) -> Iterator[str]:
    """What keeps a file's tensors from being the same function in the adapter that is attached, one sentence each.

    Layers, forms, ranks, scales (`alpha / rank`), products and heads count; how an adapter starts, and what acts in
    training alone, do not.

    Example:
        >>> import glora
        >>> here, there = (LayerSpec(glora.GLoRAConfig(rank=4, alpha=alpha)) for alpha in (4, 32))
        >>> len(list(differences(AdapterSpec({"q": here}), AdapterSpec({"q": there}))))
        1
    """
    for path in {**attached.layers, **file.layers}:
        if path not in attached.layers or path not in file.layers:
            yield f"{path!r} is adapted in the {'model' if path in attached.layers else 'file'} alone"
        elif _function(attached.layers[path]) != _function(file.layers[path]):
            yield f"{path!r} is {attached.layers[path].config} in the model and {file.layers[path].config} in the file"
    here, there = (
        ({path: sorted(names) for path, names in adapter.heads.items()}, dict(adapter.ties))
        for adapter in (attached, file)
    )
    if here != there:
        yield f"heads {here[0]} tied to {here[1]} in the model, {there[0]} to {there[1]} in the file"


def _function(layer: LayerSpec) -> LayerSpec:
    """The fields that must match: no rank where no path is low rank, no product where there is no A."""
    rank, product = layer.rank or 1, "hadamard" if layer.config.A == "none" else layer.config.product
    alpha = layer.config.scaling * rank if layer.rank else 1.0
    balance = "rms" if layer.config.is_balanced else "none"
    config = replace(
        layer.config, init="identity", rank_dropout=0.0, rank=rank, alpha=alpha, product=product, balance=balance
    )
    return replace(layer, config=config, matrix=None, batch=layer.batch or ())


def report_other_base(keys: Sequence[str], source: object, *, strict: bool, stacklevel: int) -> None:
    """Say that these frozen tensors are not those that an adapter was trained beside (Note [Fingerprints]).

    Raises:
        AdapterFileError: there are some, and `strict`; else there is a warning.
    """
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


def mismatches(
    given: Mapping[str, object],
    wanted: Mapping[str, TensorSpec],
    *,
    strict: bool = True,
    optional: Iterable[str] = (),
    needs_data: bool = True,
) -> Iterator[str]:
    """What is wrong with tensors, one sentence each: missing, left over, of another kind, shape or dtype.

    Args:
        given: key to tensor.
        wanted: key to what it must be.
        strict: whether every wanted key must be there, and no other.
        optional: keys that may be there, and are not wanted.
        needs_data: whether a tensor on the meta device is wrong.
    """
    optional = set(optional)
    if strict:
        missing = [key for key in wanted if key not in given]
        unexpected = [key for key in given if key not in wanted and key not in optional]
        if missing:
            yield f"missing: {format_names(missing)}"
        if unexpected:
            yield f"unexpected: {format_names(unexpected)}"
    for key, spec in wanted.items():
        if key not in given:
            continue
        tensor = given[key]
        if not isinstance(tensor, Tensor):
            yield f"{key}: a {type(tensor).__name__} where a tensor should be"
        elif spec.shape is not None and not _fits(tensor.shape, spec.shape):
            yield f"{key}: shape {tuple(tensor.shape)} where {spec.shape} should be"
        elif (needs_data and tensor.is_meta) or tensor.layout != torch.strided:
            yield f"{key}: a tensor without data ({tensor.layout}, {tensor.device}) where a dense one should be"
        elif spec.floating is not None and (tensor.is_floating_point() != spec.floating or tensor.is_complex()):
            yield f"{key}: {tensor.dtype} where {'a floating' if spec.floating else 'an integer'} dtype should be"


def _fits(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    if shape == wanted:
        return True
    return len(shape) == len(wanted) and all(w in (None, size) for w, size in zip(wanted, shape, strict=True))
