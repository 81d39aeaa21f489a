"""Every public call that changes a model, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import glora
from glora.search import Space
from tests.helpers.calls import LORA, RANDOM, attach, only
from tests.helpers.models import build
from tests.helpers.search import supernet


@dataclass(frozen=True)
class Change:
    """A call that changes a model.

    Attributes:
        call: given a model that `make` made, and the folder of an adapter `a` of it.
        make: the model before.
        takes_off: whether adapters come off their tensors.
        overwrites: whether numbers are written over, which nothing gives back.
    """

    call: Callable[[nn.Module, Path], object]
    make: Callable[[], nn.Module]
    takes_off: bool = False
    overwrites: bool = False


def one() -> nn.Module:
    """With the adapter `a`, its heads included."""
    return attach(build(), RANDOM, name="a", trainable=["head"])


def two() -> nn.Module:
    """With `a` and `b`; both act, `a` has the head."""
    return glora.activate(attach(one(), LORA, targets=["first", "second"], name="b"), "a")


def entangled() -> nn.Module:
    """With a supernet `a` on two layers."""
    return supernet(build(), Space(ranks=[1, 2]), ["first", "third"], name="a")


CHANGES: dict[str, Change] = {
    "apply": Change(lambda model, _: attach(model, name="c", trainable=["norm"]), two),
    "apply the first": Change(lambda model, _: attach(model, name="c"), build),
    "load": Change(lambda model, folder: glora.load(model, folder, "c"), two),
    "load in place": Change(
        lambda model, folder: glora.load(model, folder, "a", replace=True, check=False), two, overwrites=True
    ),
    "load another": Change(
        lambda model, folder: glora.load(model, folder, "b", replace=True, check=False), two, takes_off=True
    ),
    "load_peft": Change(lambda model, folder: glora.interop.load_peft(model, folder / "peft", "c"), two),
    "combine": Change(lambda model, _: glora.combine(model, {"a": 1.0, "b": 0}, name="c", rank=1), two),
    "extract from a model": Change(lambda model, _: glora.extract(model, build(), ["first"], LORA, name="c"), two),
    "supernet": Change(lambda model, _: glora.search.supernet(model, ["first"], Space(), name="c"), two),
    "extract": Change(lambda model, _: glora.search.extract(model, {"first": LORA}), entangled, takes_off=True),
    "activate": Change(lambda model, _: glora.activate(model, "b"), two),
    "activate none": Change(lambda model, _: glora.activate(model, {}), two),
    "reset_parameters": Change(lambda model, _: glora.reset_parameters(model, "a"), two, overwrites=True),
    "load_state_dict": Change(
        lambda model, _: glora.load_state_dict(model, {"head.bias": model.norm.bias[:2] + 1}, "a", strict=False),
        two,
        overwrites=True,
    ),
    "delete": Change(lambda model, _: glora.delete(model, "b"), two, takes_off=True),
    "delete the last": Change(lambda model, _: glora.delete(model, "a"), one, takes_off=True),
    "remove": Change(lambda model, _: glora.remove(model), two, takes_off=True),
    "merge": Change(lambda model, _: glora.merge(model), one, takes_off=True, overwrites=True),
}


def saved(folder: Path) -> Path:
    """An adapter of such a model, as glora and as PEFT write it."""
    glora.save(one(), folder, "a")
    glora.interop.save_peft(
        attach(build(), only(A="vector", B="vector"), targets=["first"], name="a"), folder / "peft", "a"
    )
    return folder
