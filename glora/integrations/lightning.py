"""Lightning's checkpoints with the adapter instead of the model."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from glora.files.adapter import parse, to_json
from glora.files.container import import_optional
from glora.integrations.active import active_adapter, restore
from glora.layer.keys import KEPT_APART
from glora.layer.parametrization import is_adapted
from glora.model.adapters import adapter_tensors, adapters
from glora.model.attach import attach_spec
from glora.model.state import describe
from glora.model.walk import Model, adapted_owners
from glora.spec import AdapterSpec

if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = import_optional("lightning.pytorch", "lightning").Callback

# Note [Lightning's checkpoints]
# A checkpoint has the adapter's tensors under `_TENSORS` and their description, as adapter files have it, under
# `_DESCRIPTION`. Callbacks have their own ideas of the state dict: weight averaging (EMA) saves the average as
# `"state_dict"`, the model as `"current_model_state"`, and reads both back as whole models. So what it and Lightning
# are shown is whole: the module's own hooks, which are called behind all callbacks' when a checkpoint is saved and
# before them when one is loaded, take the base model out and put it back, whatever the order of the callbacks.
#
# `load_from_checkpoint` is Lightning's and calls no callback. The empty state dict's metadata, which torch hands to
# each module that loads it, make adapted modules say what to call (Note [Kept apart]).
_TENSORS = "glora"
_DESCRIPTION = "glora_description"
_AVERAGE = "glora_average"
_CURRENT = "current_model_state"
_ADVICE = "glora.integrations.lightning.load(module, file), given a module that is made as it was for training"


class AdapterCheckpoints(_Callback):
    """A callback: the Trainer's checkpoints hold the active adapter under `"glora"`, and an empty `"state_dict"`.

    The rest of a checkpoint (optimizers, loops, callbacks) is Lightning's own. `fit(..., ckpt_path=...)` reads the
    adapter back into the module, to which it must be attached already, with the same config; so do `validate`, `test`
    and `predict`. Beside weight averaging (`WeightAveraging`, `EMAWeightAveraging`), in either order, the adapter's
    average is kept under `"glora_average"`, and training goes on as with whole checkpoints. Running statistics
    (BatchNorm's) are in it; other buffers that training changes only where their module is one of `trainable=`. A
    checkpoint without an adapter of glora is refused. Lightning's `load_from_checkpoint` is refused too where the
    module makes its adapters itself: `load` takes its place.

    Raises:
        ValueError: as `fit` starts, or while saving: not exactly one adapter is active, or a parameter trains that does
            not belong to it; while loading: there is no adapter.
        glora.AdapterFileError: while loading: an adapter of another description (layers, forms, rank, alpha, product)
            than the one that is attached; nothing has changed.
        ImportError: lightning is not installed (the extra `glora[lightning]`).

    Warns:
        UserWarning: while loading: frozen tensors, by name, that are not those beside which the adapter was trained.

    Example:
        >>> from lightning.pytorch import Trainer  # doctest: +SKIP
        >>> Trainer(callbacks=[AdapterCheckpoints()]).fit(module, ckpt_path="last.ckpt")  # doctest: +SKIP
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Put our hooks in front of the module's own (Note [Lightning's checkpoints])."""
        pl_module.on_save_checkpoint = MethodType(_save, pl_module)
        pl_module.on_load_checkpoint = MethodType(_load, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """Refuse what no checkpoint could hold."""
        active_adapter(pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:  # noqa: ARG002
        """Put our hook there for this one checkpoint where it is saved after training."""
        if "on_save_checkpoint" not in vars(pl_module):
            pl_module.on_save_checkpoint = MethodType(_save_once, pl_module)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:  # noqa: ARG002
        """Take our hooks away."""
        for hook in ("on_save_checkpoint", "on_load_checkpoint"):
            vars(pl_module).pop(hook, None)


def load(module: Model, file: str | os.PathLike[str]) -> Model:
    """Read a checkpoint that `AdapterCheckpoints` has written into a module, for inference or for a new training.

    The adapter is attached where the module has none; else it is written into the active one. Of a checkpoint with an
    average of the weights (EMA), this is the average, as Lightning's `load_from_checkpoint` gives it.

    Args:
        module: the LightningModule, made as it was for training: its base model is in no checkpoint.
        file: the checkpoint. Only tensors and plain data are unpickled.

    Returns:
        The module.

    Raises:
        ValueError: the checkpoint has no adapter; several adapters are active, or none of those that are attached.
        glora.AdapterFileError: the adapter does not fit the module, or the one that is attached; nothing has changed.

    Warns:
        UserWarning: frozen tensors, by name, that are not those beside which the adapter was trained.

    Example:
        >>> module = load(Module(**hyperparameters), "last.ckpt")  # doctest: +SKIP
    """
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    spec = _parse(checkpoint, checkpoint.get(_AVERAGE) or checkpoint.get(_TENSORS), file)
    if adapters(module):
        restore(module, spec, file)
        return module
    return attach_spec(module, spec, file)


def _parse(checkpoint: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, source: object) -> AdapterSpec:
    if tensors is None or _DESCRIPTION not in checkpoint:
        raise ValueError(
            "A checkpoint that is loaded with glora's AdapterCheckpoints must hold an adapter; found none. Leave the "
            "callback out to load a checkpoint of the model."
        )
    return parse(source, json.loads(checkpoint[_DESCRIPTION]), tensors)


def _save(self: Any, checkpoint: dict[str, Any]) -> None:
    """A module's `on_save_checkpoint`: the adapter in place of the model, and its average in place of the average."""
    cast("Any", type(self)).on_save_checkpoint(self, checkpoint)
    name = active_adapter(self)
    adapter = describe(self, name)
    checkpoint[_TENSORS], checkpoint[_DESCRIPTION] = dict(adapter.tensors), json.dumps(to_json(adapter))
    if _CURRENT in checkpoint:
        average = checkpoint["state_dict"]
        checkpoint[_AVERAGE] = {key: average[torch_key] for key, torch_key in _torch_keys(self, name).items()}
        checkpoint[_CURRENT] = {}
    checkpoint["state_dict"] = empty = cast("Any", OrderedDict())
    empty._metadata = {path: {KEPT_APART: _ADVICE} for path, module in self.named_modules() if is_adapted(module)}


def _save_once(self: Any, checkpoint: dict[str, Any]) -> None:
    del self.on_save_checkpoint
    _save(self, checkpoint)


def _load(self: Any, checkpoint: dict[str, Any]) -> None:
    """A module's `on_load_checkpoint`: the adapter is read, and Lightning and callbacks find whole models."""
    restore(self, _parse(checkpoint, checkpoint.get(_TENSORS), "the checkpoint"), "the checkpoint")
    whole = dict(self.state_dict())
    checkpoint["state_dict"] = whole
    if _AVERAGE in checkpoint:
        keys = _torch_keys(self, active_adapter(self))
        # Lightning writes the average into the module before the callback reads the current one.
        checkpoint[_CURRENT] = whole | {key: whole[key].clone() for key in keys.values()}
        checkpoint["state_dict"] = whole | {keys[key]: tensor for key, tensor in checkpoint[_AVERAGE].items()}
    cast("Any", type(self)).on_load_checkpoint(self, checkpoint)


def _torch_keys(module: nn.Module, name: str) -> dict[str, str]:
    """An adapter's keys to those of the module's own state dict."""
    torch_keys = {id(tensor): key for key, tensor in module.state_dict(keep_vars=True).items()}
    tensors = adapter_tensors(adapted_owners(module), name)
    return {key: torch_keys[id(tensor)] for key, tensor in tensors.items()}
