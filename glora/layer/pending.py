"""Parameters that are frozen while a graph may still be pending: its gradients reach them all the same."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

# Note [Pending graphs]
# Autograd drops a gradient that arrives at a parameter which was frozen since its forward pass, without a word. An
# adapter that stops acting is frozen, and `(loss_a + loss_b).backward()` must still train it. Whether a graph is
# pending cannot be asked. So a frozen parameter has two hooks: it asks for a gradient from just before one is
# accumulated until just after. The hooks go when the adapter acts again.
_watched: weakref.WeakKeyDictionary[nn.Module, list[_Pending]] = weakref.WeakKeyDictionary()
"""Part to the hooks on its parameters. A deep copy has none, as it has no graph."""


class _Pending:
    """The two hooks of one parameter."""

    def __init__(self, parameter: nn.Parameter) -> None:
        # The hooks refer back to it: a cycle that Python's garbage collector does not see.
        self.parameter, self.opened, self.expected = weakref.ref(parameter), 0, False
        self.handles: list[RemovableHandle] = [
            parameter.register_hook(self.open),  # pyright: ignore[reportUnknownMemberType]
            parameter.register_post_accumulate_grad_hook(self.close),  # pyright: ignore[reportUnknownMemberType]
        ]

    def open(self, _gradient: Tensor) -> None:
        """Let the parameter ask for a gradient until one has been accumulated."""
        parameter = self.parameter()
        if parameter is not None and (self.opened or self.expected or not parameter.requires_grad):
            self.opened, self.expected = self.opened + 1, False  # once for each backward pass that is under way
            parameter.requires_grad = True

    def expect(self) -> None:
        """Let the parameter ask for a gradient that is yet to be computed (Note [Checkpoints])."""
        parameter = self.parameter()
        if parameter is not None and not parameter.requires_grad:
            parameter.requires_grad = self.expected = True

    def close(self, parameter: Tensor) -> None:
        """Freeze it again."""
        if self.opened:
            self.opened -= 1
            parameter.requires_grad = self.opened > 0


def watch(part: nn.Module, parameter: nn.Parameter) -> None:
    """Let the gradients of pending graphs reach a part's parameter, which is about to be frozen."""
    _watched.setdefault(part, []).append(_Pending(parameter))


def forget(part: nn.Module) -> None:
    """Take the hooks off a part's parameters, which train again."""
    for pending in _watched.pop(part, ()):
        for handle in pending.handles:
            handle.remove()


def is_watched(part: nn.Module) -> bool:
    """Whether parameters of the part are frozen for now."""
    return part in _watched


def reopen(part: nn.Module) -> None:
    """Let the part's parameters ask for gradients until these have come (Note [Checkpoints])."""
    for pending in _watched.get(part, ()):
        pending.expect()
