"""Lightning's checkpoints with the adapter in place of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from glora.files.container import import_optional
from glora.integrations.acting import acting_adapter
from glora.model.state import load_state_dict, state_dict

if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = import_optional("lightning.pytorch", "lightning").Callback

_KEY = "glora"


class AdapterCheckpoints(_Callback):
    """A callback: the Trainer's checkpoints hold the acting adapter under `"glora"`, and an empty `"state_dict"`.

    The rest of a checkpoint (optimizers, loops, callbacks) is Lightning's own. `fit(..., ckpt_path=...)` reads the
    adapter back into the module, on which it must be attached as it was; so do `validate`, `test` and `predict`. What
    else the module holds and training changes (BatchNorm's buffers) is in no adapter, unless its module is one of the
    `trainable=`. A checkpoint without an adapter of glora is refused.

    Raises:
        ValueError: while saving: not exactly one adapter acts, or something trains that is not the adapter's; while
            loading: the checkpoint's adapter does not fit, or there is none.
        ImportError: lightning is not installed (the extra `glora[lightning]`).

    Example:
        >>> from lightning.pytorch import Trainer  # doctest: +SKIP
        >>> Trainer(callbacks=[AdapterCheckpoints()]).fit(module, ckpt_path="last.ckpt")  # doctest: +SKIP
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Let the module take a checkpoint without its state dict."""
        self._strict = pl_module.strict_loading
        pl_module.strict_loading = False

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Give the module its strictness back."""
        pl_module.strict_loading = self._strict

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Put the adapter in the state dict's place."""
        checkpoint[_KEY] = state_dict(pl_module, acting_adapter(pl_module))
        checkpoint["state_dict"] = {}

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Write the adapter into the module."""
        if _KEY not in checkpoint:
            raise ValueError(
                "A checkpoint that is loaded with glora's AdapterCheckpoints must hold an adapter; found none. Leave "
                "the callback out to load a whole checkpoint."
            )
        load_state_dict(pl_module, checkpoint[_KEY], acting_adapter(pl_module))
