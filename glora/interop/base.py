"""The model that another library's file is for: its matrices and modules by their paths, as the base has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glora.model.change import walk_to_read
from glora.model.walk import Owner, Site, sites
from glora.precision import wide
from glora.spec import AdapterSpec, join
from glora.tensors import dense, gathered


class Base(NamedTuple):
    """A model's matrices and modules, under every path that reaches them; empty where there is no model.

    Attributes:
        sites: path to matrix.
        owners: path to module.
        model: the model itself.
        partial: whether it is a checkpoint's file, which does not tell all (Note [Bases without a model]).
    """

    sites: Mapping[str, Site] = {}
    owners: Mapping[str, Owner] = {}
    model: nn.Module | None = None
    partial: bool = False


def base_of(model: nn.Module | None) -> Base:
    """The base of a model, adapters or not."""
    if model is None:
        return Base()
    walk = walk_to_read(model)
    known = {alias: site for site in sites(walk) for alias in site.aliases}
    return Base(known, {alias: owner for owner in walk for alias in owner.aliases}, model)


def site_at(base: Base, path: str) -> Site:
    """The matrix at a path.

    Raises:
        ValueError: no model is there to look into, or it has no such matrix.
    """
    if base.model is None:
        raise ValueError(f"{path!r} must be computed beside its base weight: give the base model")
    if path not in base.sites:
        alone = ", as far as a checkpoint's file tells: give the model's folder, with its config.json"
        raise ValueError(f"{path!r} is no layer of this model that can be adapted{alone if base.partial else ''}")
    return base.sites[path]


def weight_at(base: Base, path: str) -> Tensor:
    """The base weight at a path as a matrix `(out, in)`, or a batch of them: dense, whole, float32 at least."""
    site = site_at(base, path)
    if site.weight.is_meta:
        raise ValueError(f"{path!r} must be computed beside its base weight, which is on the meta device")
    with torch.no_grad():
        return wide(dense(gathered(site.weight.detach()))).cpu()


def with_statistics(adapter: AdapterSpec, base: Base) -> AdapterSpec:
    """The adapter with its running statistics as heads, where training has changed them: module, base weight and all.

    Raises:
        ValueError: it has some, and no model is there to look into.
    """
    heads, tensors = dict(adapter.heads), dict(adapter.tensors)
    for path, names in adapter.statistics.items():
        if path not in base.owners:
            raise ValueError(f"{path!r} has running statistics, which are saved beside its weight: give the base model")
        owner = base.owners[path]
        if any(not torch.equal(adapter.tensors[join(path, name)], owner.tensors[name]) for name in names):
            heads[path] = tuple(owner.tensors)
            tensors = {join(path, key): tensor.detach() for key, tensor in owner.tensors.items()} | tensors
    return replace(adapter, heads=heads, tensors=tensors, statistics={})


def bias_at(base: Base, path: str) -> Tensor | None:
    """The base bias at a path, float32 at least; None where the layer has none of its own."""
    site = site_at(base, path)
    if not site.has_own_bias or site.matrix.bias is None:
        return None
    return wide(gathered(site.owner.tensors[site.matrix.bias].detach())).cpu()
