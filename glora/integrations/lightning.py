"""Lightning's checkpoints with the adapter instead of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from glora.files.container import import_optional
from glora.integrations.active import active_adapter
from glora.model.state import load_state_dict, state_dict

if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = import_optional("lightning.pytorch", "lightning").Callback

_KEY = "glora"


class AdapterCheckpoints(_Callback):
    """A callback: the Trainer's checkpoints hold the active adapter under `"glora"`, and an empty `"state_dict"`.

    The rest of a checkpoint (optimizers, loops, callbacks) is Lightning's own. `fit(..., ckpt_path=...)` reads the
    adapter back into the module, to which it must be attached already, with the same config; so do `validate`, `test`
    and `predict`. Buffers of the base model that training changes (BatchNorm's) are saved only where their module is
    one of `trainable=`. A checkpoint without an adapter of glora is refused.

    Raises:
        ValueError: while saving: not exactly one adapter is active, or a parameter trains that does not belong to it;
            while loading: the checkpoint's adapter does not fit, or there is none.
        ImportError: lightning is not installed (the extra `glora[lightning]`).

    Example:
        >>> from lightning.pytorch import Trainer  # doctest: +SKIP
        >>> Trainer(callbacks=[AdapterCheckpoints()]).fit(module, ckpt_path="last.ckpt")  # doctest: +SKIP
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Make the module accept a checkpoint without its state dict."""
        self._strict = pl_module.strict_loading
        pl_module.strict_loading = False

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Restore the module's strictness."""
        pl_module.strict_loading = self._strict

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Replace the state dict by the adapter."""
        checkpoint[_KEY] = state_dict(pl_module, active_adapter(pl_module))
        checkpoint["state_dict"] = {}

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Write the adapter into the module."""
        if _KEY not in checkpoint:
            raise ValueError(
                "A checkpoint that is loaded with glora's AdapterCheckpoints must hold an adapter; found none. Leave "
                "the callback out to load a checkpoint of the model."
            )
        load_state_dict(pl_module, checkpoint[_KEY], active_adapter(pl_module))
