"""The adapter that comes closest to a fine-tuned checkpoint."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from glora.arithmetic.fit import fit_bias, fit_weight
from glora.arithmetic.low_rank import double, norm
from glora.config import GLoRAConfig
from glora.files.checkpoint import checkpoint_readers, renaming
from glora.fingerprint import Fingerprint, fingerprint
from glora.layer.factors import balance_of
from glora.model.attach import attach, warn_of
from glora.model.change import change
from glora.model.plan import plan_targets
from glora.model.records import Plan, PlannedLayer
from glora.model.targets import ALL_LINEAR, Selection, Targets, Trainable
from glora.model.walk import Model, Owner, owners
from glora.spec import AdapterSpec, LayerSpec, join
from glora.tensors import dense, is_sharded
from glora.text import format_names, table

Readers = Mapping[str, Callable[[], Tensor]]
Tuned = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]


def extract(
    model: Model,
    tuned: Tuned,
    targets: Targets = ALL_LINEAR,
    config: GLoRAConfig | None = None,
    *,
    exclude: Selection = (),
    trainable: Trainable = (),
    name: str = "default",
) -> Model:
    r"""Attach the adapter that comes closest to a fine-tuned model, and print how close it comes.

    For each layer, with the fine-tuned $W$ and $b$, its paths make

    $$\|W - (W_0 + W_0 \ast A + B)\|^2 + \|b - (b_0 + b_0 \odot D + E + W_0 C)\|^2$$

    small: the smallest that there is where one of A and B is none, or A is a vector, a constant or of the matrix
    product; else by least squares in turn (Note [Nearest adapter]). The table has the root of this as a share of what
    the fine-tuning changed, for each layer and in all.

    The checkpoint is read tensor by tensor: no second model stands in memory.

    Args:
        model: the base model that was fine-tuned.
        tuned: what it became: a `.safetensors` file, the `.index.json` of a sharded one, or a folder with either; a
            state dict; or a module. Its keys are the model's, or differ from them by one component in front.
        targets: the layers to adapt; `config`, `exclude`, `name`: as `glora.apply` takes them.
        config: the forms and the rank.
        exclude: layers to leave out.
        trainable: modules to take as a whole, as heads.
        name: the adapter's name.

    Returns:
        The model; the new adapter is the only active one, and trains.

    Raises:
        ValueError: as `glora.apply`; a tensor of a layer or head that the checkpoint does not have, or of another shape
            or not finite; a base without memory, or sharded. Nothing has changed then.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Warns:
        UserWarning: other tensors that the fine-tuning changed, by name; as `glora.apply`.

    Example:
        >>> import copy, torch, glora
        >>> base = torch.nn.Linear(4, 3)
        >>> tuned = copy.deepcopy(base)
        >>> with torch.no_grad():
        ...     _ = tuned.weight.add_(torch.outer(torch.ones(3), torch.arange(4.0)))
        >>> layer = glora.extract(base, tuned, config=glora.GLoRAConfig.lora(rank=1))
        adapter 'default': relative error 0.00% of what was changed
        module           forms   rank  relative error
        the model itself  B=lora  1              0.00%
        >>> torch.allclose(layer.weight, tuned.weight, atol=1e-5)
        True
    """
    with change(model) as walk, torch.no_grad():
        planned = plan_targets(walk, targets, config, exclude=exclude, trainable=trainable, name=name)
        warn_of(planned)
        weights = [_keys(layer)[0] for layer in planned.layers]
        readers = _readers(tuned)
        rename = renaming(weights, readers)
        values, fits = _extracted(planned, lambda key: _read(readers, rename(key)))
        _warn_of_others(walk, planned, readers, rename)
        attach(walk, planned, values=values)
    print(fit_table(f"adapter {name!r}", fits))
    return model


class Fit(NamedTuple):
    """How close a layer's paths come: the norm of what was changed, and of what is left of it."""

    path: str
    spec: LayerSpec
    changed: float
    left: float


def fit_table(title: str, fits: list[Fit]) -> str:
    """Relative errors, of each layer and in all."""
    changed, left = math.hypot(*[fit.changed for fit in fits]), math.hypot(*[fit.left for fit in fits])
    rows = [[f.path or "the model itself", f.spec.forms, f.spec.rank, _share(f.left, f.changed)] for f in fits]
    header = ["module", "forms", "rank", "relative error"]
    return table(f"{title}: relative error {_share(left, changed)} of what was changed", header, rows)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _readers(tuned: Tuned) -> Readers:
    """Key to a function that reads the tensor."""
    if isinstance(tuned, nn.Module):
        return {
            join(path, name): partial(getattr, owner.module, name)
            for owner in owners(tuned)
            for path in owner.aliases
            for name in owner.tensors
        }
    if isinstance(tuned, Mapping):
        return {key: partial(_itself, tensor) for key, tensor in tuned.items()}
    if not isinstance(tuned, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"tuned must be a file, a folder, a state dict or a module; found a {type(tuned).__name__}.")
    return checkpoint_readers(Path(tuned))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _read(readers: Readers, key: str) -> Tensor | None:
    return readers[key]().detach() if key in readers else None


def _keys(layer: PlannedLayer) -> tuple[str, str]:
    """The keys of a layer's weight and bias."""
    matrix = layer.site.matrix
    module = matrix.module_path(layer.path)
    return join(module, matrix.weight), join(module, matrix.bias or "")


def _extracted(planned: Plan, read: Callable[[str], Tensor | None]) -> tuple[dict[str, Tensor], list[Fit]]:
    """The adapter's tensors, and how close each layer comes."""
    values, fits = dict[str, Tensor](), list[Fit]()
    for layer in planned.layers:
        own, fit = _layer(layer, read)
        values |= {join(layer.path, key): value for key, value in own.items()}
        fits.append(fit)
    for head in planned.heads:
        for name in head.names:
            key = join(head.path, name)
            values[key] = _checked(key, read(key), head.owner.tensors[name])
    return values, fits


def _layer(
    layer: PlannedLayer, read: Callable[[str], Tensor | None], path: str | None = None
) -> tuple[dict[str, Tensor], Fit]:
    """A layer's tensors, and how close they come; `path`: where it is not the layer's in its model."""
    site, config, (weight_key, bias_key) = layer.site, layer.config, _keys(layer)
    base = site.owner.tensors[site.matrix.weight]
    W = double(site.matrix.read(_checked(weight_key, read(weight_key), base)))
    W0 = double(dense(site.weight))
    *batch, out_features, in_features = W0.shape
    tuned_bias = read(bias_key) if site.matrix.bias is not None else None
    b0 = None
    if site.has_own_bias:
        own = site.owner.tensors[site.matrix.bias or ""]
        b0, tuned_bias = double(dense(own)), _checked(bias_key, tuned_bias, own)
    b = torch.zeros(W0.shape[:-1], dtype=W0.dtype) if tuned_bias is None else double(tuned_bias)
    db = (b.to(W0.device) - (0 if b0 is None else b0)).reshape(-1, out_features)
    found: list[dict[str, Tensor]] = []
    left: list[float] = []
    W0s, changes = (tensor.reshape(-1, out_features, in_features) for tensor in (W0, W.to(W0.device) - W0))
    for index in range(len(W0s)):
        bias = None if b0 is None else b0.reshape(-1, out_features)[index]
        paths, rest = fit_weight(W0s[index], changes[index], config)
        more, rest_of_bias = fit_bias(W0s[index], bias, db[index], config)
        found.append(dict(_tensors({**paths, **more}, config, balance_of(config, W0s[index]))))
        left += [norm(rest), norm(rest_of_bias)]
    shapes = config.shapes(out_features, in_features, None, tuple(batch))
    values = {key: torch.stack([each[key] for each in found]).reshape(shape) for key, shape in shapes.items()}
    return values, Fit(
        layer.path if path is None else path, layer.spec, math.hypot(norm(changes), norm(db)), math.hypot(*left)
    )


def _tensors(
    paths: Mapping[str, Tensor | tuple[Tensor, Tensor]], config: GLoRAConfig, balance: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """Key to tensor; the scale is divided out of the left factors, and A's balance too."""
    if balance is not None:
        yield "A.balance", balance
    for name, path in paths.items():
        if isinstance(path, Tensor):
            yield f"{name}.value", path
        else:
            divided = config.scaling if name != "A" or balance is None else config.scaling * balance
            yield f"{name}.left", path[0] / divided
            yield f"{name}.right", path[1]


def _checked(key: str, tensor: Tensor | None, base: Tensor) -> Tensor:
    """The fine-tuned tensor, which must be there, finite, and of the base's shape."""
    found = None
    if base.is_meta or is_sharded(base):
        found = f"the base's, {'without memory' if base.is_meta else 'sharded'}"
    elif tensor is None:
        found = "none"
    elif tensor.shape != base.shape:
        found = f"{tuple(tensor.shape)} for {tuple(base.shape)}"
    elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
        found = "entries that are not finite"
    if found is not None:
        raise ValueError(
            f"An adapter is extracted from the tensors that its layers and heads have before and after fine-tuning; of "
            f"{key!r} found {found}. Nothing was changed. Leave the layer out with exclude=, or take the checkpoint of "
            f"this model."
        )
    return cast("Tensor", tensor)


def _warn_of_others(walk: list[Owner], planned: Plan, readers: Readers, rename: Callable[[str], str]) -> None:
    """Name what the fine-tuning changed and the adapter does not hold."""
    held = {key for layer in planned.layers for key in _keys(layer)}
    held |= {join(head.path, name) for head in planned.heads for name in head.names}
    held |= {join(owner.path, name) for head in planned.heads for owner, name in head.places}
    known = {rename(join(path, name)) for owner in walk for path in owner.aliases for name in owner.tensors}
    others = [key for key in readers if key not in known and key not in {rename(key) for key in held}]
    for owner in walk:
        for name, base in owner.tensors.items():
            key = join(owner.path, name)
            tensor = _read(readers, rename(key)) if key not in held else None
            if tensor is not None and not base.is_meta and not is_sharded(base) and not _same(base, tensor):
                others.append(key)
    if others:
        warnings.warn(
            f"The checkpoint has {len(others)} tensors that are not the base's, and that the extracted adapter does "
            f"not hold ({format_names(others)}). Name their modules in targets=, or in trainable= to take them "
            f"whole.",
            UserWarning,
            stacklevel=3,
        )


def _same(base: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors are equal, as far as the second one's dtype can tell."""
    return base.shape == tensor.shape and torch.equal(dense(base).detach().to(tensor), tensor)


def extract_checkpoint(
    base: Path, tuned: Path, config: GLoRAConfig, targets: str
) -> tuple[AdapterSpec, list[Fit], list[str]]:
    """The same without the model: of the weights of two axes whose module's path the regex matches as a whole.

    Returns:
        The adapter, as of nn.Linear layers; how close each layer comes; the names of other tensors that differ. What
        the fine-tuning did not change is left out.

    Raises:
        ValueError: nothing that matches was changed; as `extract`.
    """
    before, after = checkpoint_readers(base), checkpoint_readers(tuned)
    layers, tensors, known = dict[str, LayerSpec](), dict[str, Tensor](), dict[str, Fingerprint]()
    fits, others = list[Fit](), dict[str, None]()
    for key, read in before.items():
        tensor, there = read(), _read(after, key)
        if there is not None and _same(tensor, there):
            continue
        path, _, name = key.rpartition(".")
        if name != "weight" or tensor.ndim != 2 or re.fullmatch(targets, path) is None:
            others[key] = None
            continue
        module = nn.Linear(1, 1, device="meta")
        module.weight = nn.Parameter(tensor, requires_grad=False)
        bias = _read(before, join(path, "bias"))
        module.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        with torch.no_grad():
            (layer,) = plan_targets(owners(module), ALL_LINEAR, config, name="default").layers
            own, fit = _layer(layer, lambda name, path=path: _read(after, join(path, name)), path)
        layers[path] = layer.spec
        fits.append(fit)
        tensors |= {join(path, key): value.float() for key, value in own.items()}
        for name, parameter in module.named_parameters():
            numbers = fingerprint(parameter)
            known |= {} if numbers is None else {join(path, name): numbers}
    if not layers:
        raise ValueError(f"{tuned} must differ from the base in a matrix that {targets!r} matches; it does in none.")
    missing = [key for key in after if key not in before]
    return AdapterSpec(layers, {}, tensors, {}, known), fits, [*(key for key in others if key not in known), *missing]
