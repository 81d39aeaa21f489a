"""What transformers and accelerate add to a model: new heads, output embeddings, `save_pretrained`, offloading."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from glora.layer.parametrization import Bias, own_tensors, stashed
from glora.model.records import Plan
from glora.model.targets import Targets
from glora.model.walk import Owner, adapted_owners, owners
from glora.spec import join
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


def task_heads(walk: list[Owner]) -> list[Owner]:
    """The modules with parameters of their own that task classes have beside their backbones (Note [Task heads])."""
    vocabularies = _vocabularies(walk)
    outputs = output_embeddings(walk)
    heads: list[Owner] = []
    within: set[int] = set()
    for owner in walk:
        beside = set[int]() if id(owner.module) in within else _beside_backbone(owner.module)
        if not beside:
            continue
        within |= {id(module) for module in owner.module.modules()}
        others = [other for other in walk if id(other.module) in beside]
        if not any(id(other.module) in outputs and _is_over(other, vocabularies) for other in others):
            heads += [n for n in others if any(isinstance(tensor, nn.Parameter) for tensor in n.tensors.values())]
    return heads


def _beside_backbone(module: nn.Module) -> set[int]:
    """Ids of what a task class has beside its backbone, itself included; nothing where it is no task class."""
    prefix = getattr(type(module), "base_model_prefix", None)
    backbone = module._modules.get(prefix) if isinstance(prefix, str) else None
    if backbone is not None:
        return {id(below) for below in module.modules()} - {id(below) for below in backbone.modules()}
    named = [child for name, child in module.named_children() if isinstance(prefix, str) and name in _NAMES]
    return {id(below) for child in named for below in child.modules()}


def warn_of_adapted_heads(walk: list[Owner], planned: Plan, targets: Targets) -> None:
    """Warn once of adapted layers that look like a new head (Note [Task heads])."""
    if not (isinstance(targets, str) or callable(targets)):
        return
    heads = task_heads(walk)
    ids = {id(head.module) for head in heads}
    suspects = [layer.path for layer in planned.layers if id(layer.module) in ids]
    if heads:
        labels = getattr(getattr(walk[0].module, "config", None), "num_labels", None)
        rows = {tuple(head.tensors["weight"].shape)[:1] for head in heads if isinstance(head.module, nn.Linear)}
        suspects = suspects if any(_is_named(head.path) for head in heads) or (labels,) in rows else []
    else:
        linear = [owner for owner in walk if isinstance(owner.module, nn.Linear)]
        last = [n.path for n in linear[-1:] if _is_named(n.path) and not _is_over(n, _vocabularies(walk))]
        suspects = [layer.path for layer in planned.layers if layer.path in last]
    if suspects:
        kept = f'trainable="{AUTO}"' if heads else f"trainable={suspects!r}"
        warnings.warn(
            f"An adapter is a change of weights that stay frozen and are not in its file; {format_names(suspects)} may "
            f"be a head that is new to the model, and random: saved, the adapter would work on these random weights "
            f"alone. {kept} trains it as a whole and keeps it in the file; exclude={suspects!r} leaves it as it is. If "
            f"its weights are from a checkpoint, either silences this, and so does naming it in a list of targets.",
            UserWarning,
            stacklevel=3,
        )


# Note [New modules]
# What `from_pretrained` did not find in a checkpoint is random: a new classifier, an output layer of another size.
# transformers marks every Parameter that it read, so that what has no mark is known, a user's own head around such a
# model too; where nothing is marked (an older version, a deep copy) nothing is said. New words are the last rows of an
# embedding that is marked: it has more rows than the config of its checkpoint says. That file is looked for on this
# machine alone. PEFT's `save_embedding_layers="auto"` saves such embeddings by itself; here `trainable=` trains them.
_READ = "_is_hf_initialized"


def warn_of_new_modules(walk: list[Owner], planned: Plan) -> None:
    """Warn of random modules that the adapter leaves as they are, so that no file has them (Note [New modules])."""
    ours = {id(row.module) for row in (*planned.heads, *planned.layers)}
    ours |= {id(owner.module) for head in planned.heads for owner, _ in head.places}
    held = [(owner, tensor) for owner in walk for tensor in owner.tensors.values() if isinstance(tensor, nn.Parameter)]
    marked = any(getattr(tensor, _READ, False) for _, tensor in held)
    new = [owner for owner, tensor in held if marked and not owner.stores and not getattr(tensor, _READ, False)]
    grown = _with_new_words(walk)
    new += [owner for owner in walk if id(owner.module) in grown]
    paths = dict.fromkeys(owner.path for owner in new if id(owner.module) not in ours)
    if paths:
        warnings.warn(
            f"What is in no checkpoint and in no adapter's file is lost with this process; {format_names(paths)} was "
            f"not in the model's checkpoint, in whole (a new head) or in part (new words), is random, and stays "
            f"frozen: the adapter would be trained beside numbers that no other process has. trainable={list(paths)!r} "
            f"trains it and keeps it in the adapter's file; or save the base as it is, and load it from there.",
            UserWarning,
            stacklevel=3,
        )


def warn_of_wrapped(walk: list[Owner], planned: Plan) -> None:
    """Warn of adapters on the factors that PEFT has put into the model: they are linear layers, and swept in."""
    factors: set[int] = set()
    for owner in walk:
        base = owner.module._modules.get("base_layer")
        if base is not None and type(owner.module).__module__.startswith("peft.tuners."):
            factors |= {id(below) for below in owner.module.modules()} - {id(below) for below in base.modules()}
    adapted = [layer.path for layer in planned.layers if id(layer.module) in factors] if factors else []
    if adapted:
        warnings.warn(
            f"PEFT's factors are adapters themselves; {format_names(adapted)} would be adapted, and frozen. Take PEFT "
            f"off first (model.unload(), or model.merge_and_unload()), or name the base layers, in targets=.",
            UserWarning,
            stacklevel=3,
        )


def _with_new_words(walk: list[Owner]) -> set[int]:
    """Ids of embeddings that have more rows than their checkpoint's config says."""
    grown: set[int] = set()
    for owner in walk:
        config: Any = getattr(owner.module, "config", None)
        source = getattr(config, "_name_or_path", None)
        if not source or not hasattr(type(owner.module), "resize_token_embeddings"):
            continue
        try:
            saved: Any = cast("Any", type(config)).from_pretrained(source, local_files_only=True)
            size: int = saved.get_text_config().vocab_size
        except Exception:  # not on this machine, or not such a config
            continue
        for embedding in embeddings(owner.module):
            weight = own_tensors(embedding).get("weight")
            if weight is not None and weight.shape[0] > size:
                grown.add(id(embedding))
    return grown


def _is_named(path: str) -> bool:
    return not _NAMES.isdisjoint(path.split("."))


def _vocabularies(walk: Iterable[Owner]) -> set[int]:
    """The rows of the model's embeddings."""
    return {owner.module.num_embeddings for owner in walk if isinstance(owner.module, nn.Embedding)}


def _is_over(owner: Owner, vocabularies: set[int]) -> bool:
    """Whether the module's outputs are as many as a vocabulary's words."""
    weight = owner.tensors.get("weight")
    return weight is not None and weight.ndim > 1 and weight.shape[0] in vocabularies


def output_embeddings(walk: Iterable[Owner]) -> set[int]:
    """Ids of the modules that the models in the tree call their output embeddings (as transformers' models do).

    `"all-linear"` leaves them out, as PEFT does: an output embedding is large, and often tied to the input's.
    """
    outputs: set[int] = set()
    for owner in walk:
        getter = getattr(owner.module, "get_output_embeddings", None)
        if callable(getter):
            try:
                outputs.add(id(getter()))
            except (AttributeError, NotImplementedError):  # a base class's stub: this model has none
                continue
    return outputs


def embeddings(model: nn.Module) -> list[nn.Module]:
    """What the models in the tree call their input and output embeddings."""
    found: list[nn.Module] = []
    for module in model.modules():
        for name in ("get_input_embeddings", "get_output_embeddings"):
            getter = getattr(module, name, None)
            if callable(getter):
                try:
                    embedding = getter()
                except (AttributeError, NotImplementedError):  # a base class's stub: this model has none
                    continue
                found += [embedding] if isinstance(embedding, nn.Module) else []
    return found


def hub_name(walk: Iterable[Owner]) -> str | None:
    """The name on a hub, `owner/name`, that a model was loaded from; None for a folder, and where it is not known."""
    for owner in walk:
        name: object = getattr(getattr(owner.module, "config", None), "_name_or_path", None)
        if isinstance(name, str) and name:
            known = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII)
            return name if known and not os.path.lexists(name) else None
    return None


# Note [Exports]
# transformers' `save_pretrained` writes `model.state_dict()`, whose keys are torch's `parametrizations.` where adapters
# are; `from_pretrained` knows none of them, and starts each adapted weight afresh with no error. Nothing that it calls
# on the way belongs to an adapted layer, and a state dict's hook does not see who asks for it. So each module that has
# a `save_pretrained` gets one of its own, as an attribute of the instance, for as long as it has adapters: `SavePlain`,
# which passes the call on to the class's where what is written is plain. It refers to its module, and no closure
# does: a deep copy of the model has a deep copy of it. `merge` and `remove` delete it. (Where `apply` was given a part
# of a model, the whole is not guarded: a module does not know what it is part of.)
GUARDED = "save_pretrained"


class SavePlain:
    """The `save_pretrained` of one module while adapters may be on it (Note [Exports])."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the class does, if the keys are plain.

        Raises:
            RuntimeError: adapted layers' keys would be written; nothing was.

        Warns:
            UserWarning: inside `glora.merged`, created biases that the model's config does not know.
        """
        adapted = adapted_owners(self.module)
        attached = [owner for owner in adapted if owner.module not in stashed]
        if attached and _has_keys_of(attached, kwargs.get("state_dict")):
            raise RuntimeError(
                f"A checkpoint for from_pretrained must have the model's plain keys, and adapters are attached to "
                f"{format_names(owner.path for owner in attached)}: from_pretrained would start each adapted weight "
                f"afresh, with no error. Nothing was written. Save the adapter alone with glora.save(model, "
                f"directory), or the whole model with the adapter baked in: `with glora.merged(model): "
                f"model.save_pretrained(directory)`, or glora.merge(model) before it. A Trainer that was made before "
                f"the adapters: make it after them, or give it the mixin glora.integrations.trainer.AdapterCheckpoints."
            )
        if not attached:
            warn_of_created_biases(owners(self.module), stacklevel=2)
        return cast("Any", type(self.module)).save_pretrained(self.module, *args, **kwargs)


def guard_save_pretrained(walk: Iterable[Owner]) -> None:
    """Give each module that has a `save_pretrained` one that refuses adapted keys."""
    for owner in walk:
        if hasattr(type(owner.module), GUARDED):
            vars(owner.module).setdefault(GUARDED, SavePlain(owner.module))


def unguard_save_pretrained(walk: Iterable[Owner]) -> None:
    """Give each module back its class's `save_pretrained`."""
    for owner in walk:
        if isinstance(vars(owner.module).get(GUARDED), SavePlain):
            del vars(owner.module)[GUARDED]


def _has_keys_of(attached: Iterable[Owner], state_dict: Mapping[str, object] | None) -> bool:
    """Whether a state dict has keys of these modules' adapters; the model's own (None) has."""
    prefixes = {join(owner.path, "") for owner in attached}
    return state_dict is None or any(
        separator and path in prefixes
        for path, separator, _ in (key.partition("parametrizations.") for key in state_dict)
    )


def warn_of_created_biases(walk: Iterable[Owner], *, stacklevel: int) -> None:
    """Warn that `from_pretrained` would leave out biases that `create_bias=True` made and a merge keeps.

    Args:
        walk: the model, as it is before the merge; only one with a config and a `save_pretrained` has that trouble.
        stacklevel: from the caller of this function to its user.
    """
    paths = [owner.path for owner in walk if any(_keeps_created_bias(store) for store in owner.stores.values())]
    if paths and any(hasattr(type(o.module), GUARDED) and hasattr(o.module, "config") for o in walk):
        warnings.warn(
            f"create_bias=True has given biases to {format_names(paths)}, which a merge keeps and the model's config "
            f"may not know: from_pretrained then leaves them out. Set the config's flag for them (attention_bias, "
            f"mlp_bias, use_bias, ...) before save_pretrained where it has one; else keep the adapter with glora.save, "
            f"or the model's state dict.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _keeps_created_bias(store: nn.Module) -> bool:
    return isinstance(store, Bias) and store.created and store.is_active()


def is_offloaded(module: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether accelerate has offloaded the module's tensors."""
    return "_hf_hook" in vars(module) and any(tensor.is_meta for tensor in tensors.values())
