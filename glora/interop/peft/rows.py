"""Rows of embeddings that PEFT trains alone: `trainable_token_indices`, and its method TRAINABLE_TOKENS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from glora.config import GLoRAConfig
from glora.interop.base import Base
from glora.interop.peft.beside import owner_at
from glora.interop.peft.lora import Written, write_lora
from glora.interop.peft.methods import Read
from glora.matrices import EMBEDDING, has_embedding_forward
from glora.model.checks import find_ties, unsupported_matrix
from glora.precision import wide
from glora.spec import AdapterSpec, LayerSpec, join

# Note [Trained rows]
# PEFT keeps k trained rows of an embedding as they stand. Here they are B of rank k, exactly: column j of `left` is 1
# at the j-th row and 0 elsewhere, row j of `right` is what training has added to it. That is k * (tokens + features)
# numbers, and no second embedding is made, neither in memory nor in a call (Note [Rows looked up]). Where it would be
# more than the embedding has, and where the embedding is tied to other modules or has a forward of its own, the rows
# are a head, the whole embedding. Written for PEFT, an embedding's B with such a `left` is its rows again.


def as_layer(path: str, rows: Tensor, indices: list[int], base: Base) -> Read | None:
    """Trained rows as B of their number (Note [Trained rows]); None where they must be a head."""
    owner, site = owner_at(base, path), base.sites.get(path)
    weight, (count, features) = owner.tensors["weight"], owner.tensors["weight"].shape
    row_of = {index % count: row for index, row in zip(indices, rows, strict=True)}  # the last one counts
    rank = len(row_of)
    if not 0 < rank * (count + features) < count * features or weight.is_meta:
        return None
    config = GLoRAConfig.lora(rank=rank)
    kind = parametrize.type_before_parametrizations(owner.module)
    if site is None or site.matrix != EMBEDDING or not has_embedding_forward(kind):
        return None
    if unsupported_matrix(site, config, find_ties(list({id(o.module): o for o in base.owners.values()}.values()))):
        return None
    places = torch.tensor(list(row_of))
    left = torch.zeros(count, rank)
    left[places, torch.arange(rank)] = 1
    right = wide(torch.stack(list(row_of.values()))) - wide(weight.detach()[places.to(weight.device)]).cpu()
    return LayerSpec(config, count, features, bias=False, matrix=EMBEDDING), {"B.left": left, "B.right": right}


def add_rows(
    path: str,
    rows: Tensor,
    indices: list[int],
    base: Base,
    heads: dict[str, tuple[str, ...]],
    tensors: dict[str, Tensor],
) -> None:
    """Add trained rows as a head: the module's weight with those rows."""
    owner = owner_at(base, path)
    weight = owner.tensors["weight"]
    whole = weight.detach().clone()
    whole[indices] = rows.to(whole)
    heads[path] = tuple(owner.tensors)
    tensors |= {join(path, name): tensor.detach() for name, tensor in owner.tensors.items()}
    tensors[join(path, "weight")] = whole


def row_indices(config: Mapping[str, Any], path: str, rows: Tensor, base: Base) -> list[int]:
    """The indices that the config has for an embedding, which must have them and so many rows.

    Raises:
        ValueError: it does not say, or says others.
    """
    indices: Any = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(indices, dict):
        known = cast("dict[str, Any]", indices)
        indices = known.get(max((name for name in known if f".{path}".endswith(f".{name}")), key=len, default=""))
    if not isinstance(indices, list):
        raise ValueError(f"{path!r} has trained rows, and the config does not say which")
    indices = cast("list[int]", indices)
    weight = owner_at(base, path).tensors.get("weight")
    if weight is None or weight.ndim != 2 or rows.shape != (len(indices), weight.shape[1]):
        raise ValueError(f"{path!r} has {tuple(rows.shape)} as {len(indices)} rows of its weight")
    if not all(type(index) is int and -len(weight) <= index < len(weight) for index in indices):
        raise ValueError(f"{path!r} has {len(weight)} rows here, and others are in the config")
    return indices


def write_rows(adapter: AdapterSpec, base: Base) -> Written:
    """An adapter with trained rows as PEFT's LoRA with `trainable_token_indices`, or alone as its TRAINABLE_TOKENS.

    Raises:
        ValueError: it has none, or PEFT cannot name them; or the rest is no LoRA.
    """
    places = {path: _places(path, layer, adapter.tensors, base) for path, layer in adapter.layers.items()}
    held = {path: indices for path, indices in places.items() if indices}
    if not held:
        raise ValueError("no embedding has trained rows alone")
    rest = replace(adapter, layers={path: layer for path, layer in adapter.layers.items() if path not in held})
    if any(owner.endswith(f".{path}") for owner in base.owners for path in held):
        raise ValueError(f"{' or '.join(map(repr, held))} is the end of another module's path too")
    if rest.layers:
        config, tensors, _ = write_lora(rest, base)
        config, inside = {**config, "trainable_token_indices": held}, "token_adapter.trainable_tokens_delta"
    else:
        indices, *others = held.values()
        if any(other != indices for other in others):
            raise ValueError("its embeddings have different rows, and TRAINABLE_TOKENS has the same for all")
        config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": [*held], "token_indices": indices}
        tensors, inside = {}, "trainable_tokens_delta"
    for path, indices in held.items():
        weight = base.owners[path].tensors["weight"].detach()
        rows = (
            wide(weight[torch.tensor(indices, device=weight.device)]).cpu() + adapter.tensors[f"{path}.B.right"].cpu()
        )
        tensors[join(path, inside)] = rows.to(weight.dtype)
    return Written(config, tensors)


def _places(path: str, layer: LayerSpec, tensors: Mapping[str, Tensor], base: Base) -> list[int]:
    """Which rows an embedding's B adds to, where it is trained rows (Note [Trained rows]); empty where it is not."""
    site = base.sites.get(path)
    if layer.matrix != EMBEDDING or layer.forms != "B=lora" or layer.config.scaling != 1 or not path:
        return []
    if site is None or site.matrix != EMBEDDING or site.weight.is_meta:
        return []
    left = tensors[join(path, "B.left")].cpu()
    indices = cast("list[int]", cast("Any", left.argmax(0)).tolist())
    one_hot = bool((left.count_nonzero(0) == 1).all()) and bool((left.amax(0) == 1).all())
    return indices if one_hot and len(set(indices)) == len(indices) else []
