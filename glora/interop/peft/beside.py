"""What PEFT's files hold beside a method's layers: biases, and whole modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.interop.base import Base, bias_at
from glora.precision import wide
from glora.spec import LayerSpec, join

# Note [PEFT's biases]
# With bias="all", or "lora_only" and the like, the file has trained biases of the base model. The difference from the
# model's own is E; on a layer without an adapter, E alone. The bias of a module of another kind (a norm's) makes that
# module a head, with its other tensors as they are. A bias that has not changed is left out.


def add_biases(
    biases: Mapping[str, Tensor],
    base: Base,
    layers: dict[str, LayerSpec],
    heads: dict[str, tuple[str, ...]],
    tensors: dict[str, Tensor],
) -> None:
    """Add trained biases, module path to bias, to what was read (Note [PEFT's biases])."""
    for path, trained in biases.items():
        owner = owner_at(base, path)
        if "bias" not in owner.tensors or owner.tensors["bias"].shape != trained.shape:
            raise ValueError(f"{path!r} has no bias of {tuple(trained.shape)} here")
        site = base.sites.get(path)
        if site is None or site.matrix.bias != "bias":
            if path not in heads and not torch.equal(owner.tensors["bias"].detach().cpu(), trained):
                heads[path] = tuple(owner.tensors)
                tensors |= {join(path, name): tensor.detach() for name, tensor in owner.tensors.items()}
                tensors[join(path, "bias")] = trained
            continue
        change = wide(trained) - cast("Tensor", bias_at(base, path))
        layer = layers.get(path)
        if layer is None:
            if path not in heads and bool(change.count_nonzero()):
                layers[path] = LayerSpec(GLoRAConfig.bitfit(), *site.weight.shape[-2:], bias=True)
                tensors[join(path, "E.value")] = change
            continue
        if layer.config.D != "none":  # which scales the trained bias
            D = tensors[join(path, "D.value")]
            if tuple(D.shape) not in ((), (1,), tuple(change.shape)):
                raise ValueError(f"{path!r} has a D of {tuple(D.shape)} on a bias of {tuple(change.shape)}")
            change = change * (1 + wide(D))
        if layer.config.E != "none":
            change = change + wide(tensors[join(path, "E.value")])
        layers[path] = replace(layer, config=replace(layer.config, E="vector"))
        tensors[join(path, "E.value")] = change


def is_embedding(base: Base, path: str) -> bool:
    """Whether a module is an embedding, or the model's output layer, which PEFT saves by itself where they changed."""
    owner = base.owners.get(path)
    outputs = getattr(base.model, "get_output_embeddings", lambda: None)()
    return owner is not None and (isinstance(owner.module, nn.Embedding) or owner.module is outputs)


def tie(
    config: Mapping[str, Any], base: Base, heads: dict[str, tuple[str, ...]], tensors: dict[str, Tensor], rows: set[str]
) -> dict[str, str]:
    """The places that share a head's Parameter in this model, key to the head's key; equal copies of one are dropped.

    Raises:
        ValueError: PEFT trained a copy apart from what it is tied to here.
    """
    ties: dict[str, str] = {}
    for path in list(heads):
        for name in heads.get(path, ()):
            tensor = (
                base.owners[path].tensors[name] if path in base.owners and name in base.owners[path].tensors else None
            )
            others = [
                join(owner.path, other)
                for owner in {id(owner.module): owner for owner in base.owners.values()}.values()
                for other, held in owner.tensors.items()
                if tensor is not None and held is tensor and owner.module is not base.owners[path].module
            ]
            for key in others:
                other, _, _ = key.rpartition(".")
                if other in heads and torch.equal(tensors[key], tensors[join(path, name)]):
                    del heads[other], tensors[key]
                elif other in heads or not (config.get("ensure_weight_tying") or path in rows):
                    raise ValueError(
                        f"{join(path, name)!r} is tied to {key!r} here, and PEFT trained a copy of it alone: give the "
                        f"model an untied clone there first (tie_word_embeddings=False)"
                    )
                ties[key] = join(path, name)
    return ties


def owner_at(base: Base, path: str) -> Any:
    """The module at a path.

    Raises:
        ValueError: there is none.
    """
    if base.model is None:
        raise ValueError(f"what was trained of {path!r} is told from the base model's own: give the base model")
    if path not in base.owners:
        raise ValueError(f"there is no module {path!r} here")
    return base.owners[path]
