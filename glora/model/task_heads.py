"""The heads that a task class puts on a backbone: new to the model as a rule, and in no checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from glora.model.planned import Plan
from glora.model.targets import Targets, output_embeddings
from glora.model.walk import Owner, owners
from glora.text import format_names

AUTO = "auto"

# Note [Task heads]
# A task class of transformers has its backbone under the name `base_model_prefix`; whatever else it has parameters in
# is its head: `classifier`, `score`, `qa_outputs`, DistilBERT's `pre_classifier`, DeBERTa's `pooler`. Most of them are
# random after `from_pretrained` of a backbone's checkpoint. A class with an output layer over a vocabulary (as many
# rows as an embedding) is a language model, whose head was trained with it: it has no task head. `trainable="auto"`
# takes the heads. The few classes with the backbone's parts as their own (T5ForQuestionAnswering) have as heads what
# they have under one of `_NAMES`.
#
# Adapted like any layer, such a head goes on standing on its random W0, which no file holds. `apply` warns of it where
# `targets=` sweeps layers in (a regex, a predicate, "all-linear"), if it is guessed to be one of classes or numbers:
# a path with one of `_NAMES` in it, or as many outputs as the config's `num_labels`. In a model without a backbone by
# name, only the last linear layer under one of `_NAMES` is taken for one, unless its outputs are a vocabulary.
_NAMES = {"classifier", "score", "head", "heads", "qa_outputs", "classification_head", "logits_proj"}


def task_heads(modules: list[Owner]) -> list[Owner]:
    """The modules with parameters of their own that task classes have beside their backbones (Note [Task heads])."""
    vocabularies = _vocabularies(modules)
    outputs = output_embeddings(modules)
    heads: list[Owner] = []
    within: set[int] = set()
    for named in modules:
        beside = set[int]() if id(named.module) in within else _beside_backbone(named.module)
        if not beside:
            continue
        within |= {id(module) for module in named.module.modules()}
        found = [other for other in modules if id(other.module) in beside]
        if not any(id(other.module) in outputs and _is_over(other, vocabularies) for other in found):
            heads += [n for n in found if any(isinstance(tensor, nn.Parameter) for tensor in n.tensors.values())]
    return heads


def _beside_backbone(module: nn.Module) -> set[int]:
    """Ids of what a task class has beside its backbone, itself included; nothing where it is no task class."""
    prefix = getattr(type(module), "base_model_prefix", None)
    backbone = module._modules.get(prefix) if isinstance(prefix, str) else None
    if backbone is not None:
        return {id(below) for below in module.modules()} - {id(below) for below in backbone.modules()}
    named = [child for name, child in module.named_children() if isinstance(prefix, str) and name in _NAMES]
    return {id(below) for child in named for below in child.modules()}


def warn_of_adapted_heads(model: nn.Module, planned: Plan, targets: Targets) -> None:
    """Warn once of what `targets=` sweeps in and is guessed to be a new head (Note [Task heads])."""
    if not (isinstance(targets, str) or callable(targets)):
        return
    modules = owners(model)
    heads = task_heads(modules)
    ids = {id(head.module) for head in heads}
    found = [layer.path for layer in planned.layers if id(layer.module) in ids]
    if heads:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        rows = {tuple(head.tensors["weight"].shape)[:1] for head in heads if isinstance(head.module, nn.Linear)}
        found = found if any(_is_named(head.path) for head in heads) or (labels,) in rows else []
    else:
        linear = [named for named in modules if isinstance(named.module, nn.Linear)]
        last = [n.path for n in linear[-1:] if _is_named(n.path) and not _is_over(n, _vocabularies(modules))]
        found = [layer.path for layer in planned.layers if layer.path in last]
    if found:
        kept = f'trainable="{AUTO}"' if heads else f"trainable={found!r}"
        warnings.warn(
            f"An adapter is a change of weights that stay frozen and are not in its file; {format_names(found)} may be "
            f"a head that is new to the model, and random: saved, the adapter would work on these random weights "
            f"alone. {kept} trains it as a whole and keeps it in the file; exclude={found!r} leaves it as it is. If "
            f"its weights are from a checkpoint, either silences this, and so does naming it in a list of targets.",
            UserWarning,
            stacklevel=3,
        )


def _is_named(path: str) -> bool:
    return not _NAMES.isdisjoint(path.split("."))


def _vocabularies(modules: Iterable[Owner]) -> set[int]:
    """The rows of the model's embeddings."""
    return {named.module.num_embeddings for named in modules if isinstance(named.module, nn.Embedding)}


def _is_over(named: Owner, vocabularies: set[int]) -> bool:
    """Whether the module's outputs are as many as a vocabulary's words."""
    weight = named.tensors.get("weight")
    return weight is not None and weight.ndim > 1 and weight.shape[0] in vocabularies
