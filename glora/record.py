"""An adapter apart from any model: its layers, its heads and its tensors, as files and other libraries know it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from torch import Tensor, nn

from glora import paths
from glora.adapters import only, refuse_while_merged, tensors
from glora.attach import attach
from glora.config import GLoRAConfig
from glora.fitness import Ties, find_ties, unfit_head, unfit_layer
from glora.parametrization import Bias, HeadCopy, Paths
from glora.planning import Plan, PlannedHead, PlannedLayer, check_name, has_own_bias
from glora.targets import listed
from glora.tree import Found, adapted, find, join, own_tensors

Model = TypeVar("Model", bound=nn.Module)


class AdapterFileError(ValueError):
    """An adapter's file is damaged, foreign, or does not fit the model. The message names the file."""


@dataclass(frozen=True)
class LayerRecord:
    """One adapted layer.

    Attributes:
        config: its forms as they are (`"none"` where there is no path), rank, alpha, product and the rest.
        out_features: rows of the base weight; None where the source does not say.
        in_features: columns of the base weight; None where the source does not say.
        bias: whether the base layer has a bias; None where the source does not say. Then a D without a bias to scale is
            left out, since it scales nothing.
    """

    config: GLoRAConfig
    out_features: int | None = None
    in_features: int | None = None
    bias: bool | None = None

    def keys(self, path: str, out_features: int, in_features: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Path (A to E), key and shape of each tensor of the layer."""
        for name, form in self.config.forms.items():
            factors = paths.shapes(
                name,
                form,
                out_features=out_features,
                in_features=in_features,
                rank=self.config.rank,
                product=self.config.product,
            )
            for factor, shape in factors.items():
                yield name, join(path, f"{name}.{factor}"), shape


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter: module path to layer, module path to the names of a head's tensors, and all tensors by their keys."""

    layers: Mapping[str, LayerRecord]
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)


def record(model: nn.Module, name: str | None = None) -> AdapterRecord:
    """An adapter of a model; its tensors share the model's memory.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter.
    """
    name = only(model, name)
    layers: dict[str, LayerRecord] = {}
    heads: dict[str, tuple[str, ...]] = {}
    for found, stores in adapted(model):
        parts = {tensor: dict(store.parts()).get(name) for tensor, store in stores.items()}
        built = [part for part in parts.values() if isinstance(part, Paths)]
        if built:
            forms = {path: form for part in built for path, form in part.built.items()}
            created = isinstance(stores.get("bias"), Bias) and cast("Bias", stores["bias"]).created
            config = replace(
                built[0].config,
                **{path: forms.get(path, "none") for path in built[0].config.forms},  # pyright: ignore
                create_bias=created and any(path in forms for path in "CE"),
            )
            out_features, in_features = own_tensors(found.module)["weight"].shape
            layers[found.path] = LayerRecord(config, out_features, in_features, has_own_bias(found.module))
        copies = tuple(tensor for tensor, part in parts.items() if isinstance(part, HeadCopy))
        if copies:
            heads[found.path] = copies
    return AdapterRecord(layers, heads, {key: tensor.detach() for key, tensor in tensors(model, name).items()})


def attach_record(
    model: Model, adapter: AdapterRecord, source: object, *, name: str = "default", trainable: bool = True
) -> Model:
    """Attach a recorded adapter and fill it, in one step: everything is checked before the model changes.

    Args:
        model: the model; other adapters may be there, and stay, inactive.
        adapter: what to attach.
        source: the file that it came from, for messages.
        name: its name in the model.
        trainable: whether its tensors ask for gradients.

    Returns:
        The model, with the adapter the only active one and the rest frozen.

    Raises:
        AdapterFileError: a layer that is not there, of another shape, or that cannot be adapted; a tensor missing, left
            over or of another shape.
        ValueError: a name that is taken.
        RuntimeError: inside `glora.merged` or `glora.route`.
    """
    refuse_while_merged(model)
    check_name(model, name)
    found = find(model)
    reached = {alias: f for f in found for alias in f.aliases}
    problems: list[str] = []
    ties = find_ties(found)
    planned = [_plan_layer(path, layer, reached, ties, problems) for path, layer in adapter.layers.items()]
    heads = [_plan_head(path, names, adapter, reached, ties, problems) for path, names in adapter.heads.items()]
    layers = [layer for layer in planned if layer is not None]
    modules = [id(row.module) for row in (*layers, *(head for head in heads if head is not None))]
    if len(modules) != len(set(modules)):
        problems.append("two of its entries reach the same module, by different paths")
    wanted = {key: shape for layer in layers for key, shape in _wanted(layer)}
    wanted |= {join(path, n): None for path, names in adapter.heads.items() for n in names}
    dropped = {
        key
        for path, layer in adapter.layers.items()
        for _, key, _ in layer.keys(path, 1, 1)
        if layer.bias is None and key.split(".")[-2] == "D"
    }
    problems += check_tensors(adapter.tensors, wanted, dropped) if not problems else []
    if not layers and not heads:
        problems.append("it adapts nothing")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterFileError(
            f"An adapter must fit the model that it is loaded into; {source} does not, and nothing was changed. "
            f"Found: {'; '.join(problems[:5])}{more}. Load it into the architecture that it was trained on."
        )
    plan = Plan(name, tuple(layers), tuple(head for head in heads if head is not None))
    return attach(model, plan, freeze=True, values=adapter.tensors, trainable=trainable)


def check_tensors(
    given: Mapping[str, Tensor], wanted: Mapping[str, tuple[int | None, ...] | None], optional: set[str]
) -> Iterator[str]:
    """What is missing, left over or of another shape (None: any) or kind."""
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted and key not in optional]
    if missing:
        yield f"missing: {listed(missing)}"
    if unexpected:
        yield f"unexpected: {listed(unexpected)}"
    for key, shape in wanted.items():
        tensor = given.get(key)
        if tensor is None or shape is None:
            continue
        if len(tensor.shape) != len(shape) or any(
            size not in (None, given) for size, given in zip(shape, tensor.shape, strict=True)
        ):
            yield f"{key}: shape {tuple(tensor.shape)} where {shape} should be"
        if not tensor.is_floating_point():
            yield f"{key}: {tensor.dtype} where a floating dtype should be"


def _wanted(layer: PlannedLayer) -> Iterator[tuple[str, tuple[int, ...]]]:
    out_features, in_features = own_tensors(layer.module)["weight"].shape
    for path, key, shape in LayerRecord(layer.config).keys(layer.path, out_features, in_features):
        if path in layer.paths:
            yield key, shape


def _plan_layer(
    path: str, layer: LayerRecord, reached: Mapping[str, Found], ties: Ties, problems: list[str]
) -> PlannedLayer | None:
    module = reached[path].module if path in reached else None
    if not isinstance(module, nn.Linear):
        what = "there is no such module" if module is None else f"it is a {type(module).__name__}, no nn.Linear"
        problems.append(f"{path!r}: {what}")
        return None
    reason = unfit_layer(module, layer.config, ties)
    if reason is not None:
        problems.append(f"{path!r}: {reason}")
        return None
    shape = tuple(own_tensors(module)["weight"].shape)
    recorded = layer.out_features, layer.in_features
    if any(mine not in (None, theirs) for mine, theirs in zip(recorded, shape, strict=True)):
        problems.append(f"{path!r}: a weight of {shape} where ({layer.out_features}, {layer.in_features}) is adapted")
        return None
    bias = has_own_bias(module)
    if layer.bias not in (None, bias):
        problems.append(f"{path!r}: {'a' if bias else 'no'} bias where {'a' if layer.bias else 'no'} bias is adapted")
        return None
    wanted = [name for name, form in layer.config.forms.items() if form != "none"]
    if not bias and layer.bias is None:
        wanted = [name for name in wanted if name != "D"]
    creates = not bias and any(name in "CDE" for name in wanted)
    if creates and (not layer.config.create_bias or "D" in wanted):
        problems.append(f"{path!r}: it has no bias for the paths C, D and E")
        return None
    return PlannedLayer(path, module, layer.config, tuple(wanted), creates)


def _plan_head(
    path: str,
    names: tuple[str, ...],
    adapter: AdapterRecord,
    reached: Mapping[str, Found],
    ties: Ties,
    problems: list[str],
) -> PlannedHead | None:
    if path not in reached:
        problems.append(f"{path!r}: there is no such module")
        return None
    module = reached[path].module
    own, reason = own_tensors(module), unfit_head(module, ties)
    if reason is not None:
        problems.append(f"{path!r}: {reason}")
    if sorted(names) != sorted(own):
        problems.append(f"{path!r}: tensors {listed(sorted(own))} where {listed(sorted(names))} are saved")
    for name in names:
        tensor, original = adapter.tensors.get(join(path, name)), own.get(name)
        if tensor is None or original is None:
            continue
        if tensor.shape != original.shape or tensor.is_floating_point() != original.is_floating_point():
            problems.append(
                f"{join(path, name)!r}: {tensor.dtype} {tuple(tensor.shape)} where {original.dtype} "
                f"{tuple(original.shape)} should be"
            )
    return PlannedHead(path, module)
