"""transformers' Trainer with checkpoints that hold the adapter instead of the model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from glora.files.adapter import read, save
from glora.files.container import ADAPTER_FILE, CONFIG_FILE
from glora.integrations.active import active_adapter, restore


class AdapterCheckpoints:
    """A mixin of `Trainer`: its checkpoints hold the active adapter, as `glora.save` writes it, instead of the model.

    A Trainer of a model with a `save_pretrained` (transformers', sentence-transformers') gets it by itself where the
    model has adapters already, and says so with its first checkpoint; it need not be named then. TRL's trainers and
    sentence-transformers' are Trainers too.

    The rest of a checkpoint (optimizer, scheduler, random state, arguments, tokenizer) is the Trainer's own.
    `train(resume_from_checkpoint=...)` and `load_best_model_at_end` read the adapter back into the model, to which it
    must be attached already, with the same config; a folder without an adapter of glora is left to the Trainer.
    `glora.load(model, folder)` reads a checkpoint too, and what `save_model` writes. Running statistics (BatchNorm's)
    are in it; other buffers that training changes only where their module is one of `trainable=`. It works in one
    process and with DistributedDataParallel, not with FSDP or DeepSpeed, which write checkpoints of their own.

    Raises:
        ValueError: as training starts with checkpoints, or while saving: not exactly one adapter is active, or a
            parameter trains that does not belong to it.
        RuntimeError: under FSDP or DeepSpeed, likewise.
        glora.AdapterFileError: while loading: a damaged file, or an adapter of another description (layers, forms,
            rank, alpha, product) than the one that is attached; nothing has changed.

    Warns:
        UserWarning: while loading: frozen tensors, by name, that are not those beside which the adapter was trained.

    Example:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> class AdapterTrainer(AdapterCheckpoints, Trainer):  # doctest: +SKIP
        ...     pass
        >>> AdapterTrainer(model, args, train_dataset=data).train(resume_from_checkpoint=True)  # doctest: +SKIP
    """

    # Attributes of the Trainer.
    model: nn.Module
    args: Any
    state: Any
    processing_class: Any
    data_collator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; what its first checkpoint would refuse is refused now."""
        if self.args.save_strategy != "no":
            self._adapter_to_save()
        return cast("Any", super()).train(*args, **kwargs)

    def _adapter_to_save(self) -> str:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RuntimeError(
                "AdapterCheckpoints works in one process or with DistributedDataParallel; found FSDP or DeepSpeed. Use "
                "the Trainer's own checkpoints, and glora.save(trainer.model, folder) at the end."
            )
        return active_adapter(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        name = self._adapter_to_save()
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        save(self.model, folder, name)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *model: Any) -> None:
        if not self._load_adapter(resume_from_checkpoint):
            cast("Any", super())._load_from_checkpoint(resume_from_checkpoint, *model)

    def _load_best_model(self) -> None:
        if not self._load_adapter(self.state.best_model_checkpoint):
            cast("Any", super())._load_best_model()

    def _load_adapter(self, folder: str | os.PathLike[str]) -> bool:
        """Read the adapter of a checkpoint into the model; False where the folder has no adapter of glora."""
        if not Path(folder, CONFIG_FILE).exists():
            return False
        restore(self.model, read(Path(folder, ADAPTER_FILE)), folder)
        return True


class Unasked(AdapterCheckpoints):
    """The mixin where nobody has asked for it (Note [Plain Trainers]): it says so once."""

    _said = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self._said:
            self._said = True
            warnings.warn(
                "A Trainer's checkpoints hold the whole model; the model has adapters of glora, and these hold the "
                "active one alone, as glora.save writes it: resume as ever, and read them with glora.load. To ask for "
                "this yourself: class AdapterTrainer(glora.integrations.trainer.AdapterCheckpoints, Trainer).",
                UserWarning,
                stacklevel=2,
            )
        super()._save(output_dir, state_dict)
