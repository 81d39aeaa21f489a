"""Adapted modules that somebody has put others in the place of."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator

from torch import nn

from glora.layer.heads import HeadCopy
from glora.layer.parametrization import Paths, stores_of
from glora.matrices import LINEAR
from glora.model.walk import Owner
from glora.spec import join
from glora.text import format_names

# Note [Replaced modules]
# `model.lm_head = nn.Linear(...)` takes the adapter on the module away with it, and nothing of glora is called. So the
# model that adapters were attached to remembers which modules have them, by path, in a plain attribute (a deep copy of
# the model remembers its own). The next call that reads or changes the model names what is not to be reached any more;
# a module that was wrapped in its place (by checkpoint_wrapper, torch.compile) is reached still.
_ATTACHED = "_glora_attached"


def remember(walk: list[Owner], adapted: Iterable[Owner]) -> None:
    """Remember the modules of a model that were adapted just now."""
    root = next(owner.module for owner in reversed(walk) if owner.path == "")  # inside of wrappers
    vars(root)[_ATTACHED] = {
        **vars(root).get(_ATTACHED, {}),
        **{owner.path: owner.module for owner in adapted if owner.module is not root},
    }


def forget(walk: Iterable[Owner]) -> None:
    """Forget them: the adapters are off."""
    for owner in walk:
        vars(owner.module).pop(_ATTACHED, None)


def warn_of_replaced(walk: Iterable[Owner]) -> None:
    """Warn, at the user's line, of adapted modules that are no longer in the model, with their tensors' names."""
    attached = [(owner.path, vars(owner.module)[_ATTACHED]) for owner in walk if _ATTACHED in vars(owner.module)]
    if not attached:
        return
    here = {id(owner.module) for owner in walk}
    gone = [(join(root, path), m) for root, known in attached for path, m in known.items() if id(m) not in here]
    keys = dict.fromkeys(key for path, module in gone for key in _keys(path.rstrip("."), module))
    if keys:
        warnings.warn(
            f"A module that an adapter is on was replaced by another, which has none: what the adapter had there is "
            f"gone from the model, acts no more and is in no file that is saved ({format_names(keys)}). Put the module "
            f"back, or attach to the new one: replace modules before glora.apply or after glora.merge.",
            UserWarning,
            stacklevel=_users_level(),
        )


def _keys(path: str, module: nn.Module) -> Iterator[str]:
    """The keys of what a module has of adapters."""
    for name, store in stores_of(module).items():
        for part in store.parts().values():
            if isinstance(part, Paths):
                prefix = join(getattr(store, "matrix", LINEAR).path(path), "")
                yield from (prefix + key for key, _ in part.named_parameters())
            elif isinstance(part, HeadCopy):
                yield join(path, name)


def _users_level() -> int:
    """The `stacklevel`, for who calls this, of the first frame outside of the library."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("glora", "contextlib"):
        level, frame = level + 1, frame.f_back
    return level + 1
