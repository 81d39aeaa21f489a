"""`save_pretrained` of a model with adapters: refused where what it writes would not load again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import nn

from glora.layer.parametrization import Bias, stashed
from glora.model.walk import Owner, adapted_owners, owners
from glora.spec import join
from glora.text import format_names

# Note [Exports]
# transformers' `save_pretrained` writes `model.state_dict()`, whose keys are torch's `parametrizations.` where adapters
# are; `from_pretrained` knows none of them, and starts each adapted weight afresh with no error. Nothing that it calls
# on the way belongs to an adapted layer, and a state dict's hook does not see who asks for it. So each module that has
# a `save_pretrained` gets one of its own, as an attribute of the instance, for as long as it has adapters: `SavePlain`,
# which passes the call on to the class's where what is written is plain. It refers to its module, and no closure
# does: a deep copy of the model has a deep copy of it. `merge` and `remove` delete it. (A model whose part alone was
# given to `apply` is not watched: a module does not know what it is part of.)
_NAME = "save_pretrained"


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
        carriers = adapted_owners(self.module)
        attached = [named for named in carriers if named.module not in stashed]
        if attached and _has_keys_of(attached, kwargs.get("state_dict")):
            raise RuntimeError(
                f"A checkpoint for from_pretrained must have the model's plain keys, and adapters are attached to "
                f"{format_names(named.path for named in attached)}: from_pretrained would start each adapted weight "
                f"afresh, with no error. Nothing was written. Save the adapter alone with glora.save(model, "
                f"directory), or the whole model with the adapter baked in: `with glora.merged(model): "
                f"model.save_pretrained(directory)`, or glora.merge(model) before it. A Trainer calls save_pretrained "
                f"for each checkpoint; save_strategy='no' stops that."
            )
        if not attached:
            warn_of_created_biases(self.module, carriers, stacklevel=3)
        return cast("Any", type(self.module)).save_pretrained(self.module, *args, **kwargs)


def guard_save_pretrained(model: nn.Module) -> None:
    """Give each module that has a `save_pretrained` one that refuses adapted keys."""
    for named in owners(model):
        if hasattr(type(named.module), _NAME):
            vars(named.module).setdefault(_NAME, SavePlain(named.module))


def unguard_save_pretrained(model: nn.Module) -> None:
    """Give each module back its class's `save_pretrained`."""
    for named in owners(model):
        if isinstance(vars(named.module).get(_NAME), SavePlain):
            del vars(named.module)[_NAME]


def _has_keys_of(attached: Iterable[Owner], given: Mapping[str, object] | None) -> bool:
    """Whether a state dict has keys of these modules' adapters; the model's own (None) has."""
    owners = {join(named.path, "") for named in attached}
    return given is None or any(
        separator and path in owners for path, separator, _ in (key.partition("parametrizations.") for key in given)
    )


def warn_of_created_biases(model: nn.Module, modules: Iterable[Owner], *, stacklevel: int) -> None:
    """Warn that `from_pretrained` would leave out biases that `create_bias=True` made and a merge keeps.

    Args:
        model: the model; only one with a config and a `save_pretrained` has that trouble.
        modules: its modules with adapters, as they are before the merge.
        stacklevel: from the caller of this function to its user.
    """
    paths = [named.path for named in modules if _keeps_created_bias(named)]
    owner = next((n.module for n in owners(model) if hasattr(type(n.module), _NAME)), None)
    config = getattr(owner, "config", None)
    if not paths or config is None:
        return
    flags = {name: value for name, value in _bias_flags(config, "config") if _is_about(name, paths)}
    unset = [name for name, value in flags.items() if not value]
    if flags and not unset:
        return
    remedy = (
        f"Set {' and '.join(f'model.{name} = True' for name in unset)} before save_pretrained, and they are read."
        if unset
        else "The config has no flag for them: keep the adapter with glora.save, or the model's state dict."
    )
    warnings.warn(
        f"create_bias=True has given biases to {format_names(paths)}, which a merge keeps and the model's config does "
        f"not know: from_pretrained would leave them out. {remedy}",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def _keeps_created_bias(named: Owner) -> bool:
    return any(isinstance(store, Bias) and store.created and store.is_active() for store in named.stores.values())


def _bias_flags(config: object, prefix: str) -> Iterator[tuple[str, bool]]:
    """The booleans of a config, and of those inside it, whose names end with `bias`."""
    for name, value in vars(config).items():
        if name.endswith("bias") and isinstance(value, bool):
            yield f"{prefix}.{name}", value
        elif name.endswith("_config") and hasattr(value, "__dict__"):
            yield from _bias_flags(value, f"{prefix}.{name}")


def _is_about(flag: str, paths: Iterable[str]) -> bool:
    """Whether a flag is of all layers (`bias`, `use_bias`), or its part (`attention`, `mlp`) is in one of the paths."""
    part = flag.rpartition(".")[2].removesuffix("bias").strip("_")
    part = "attn" if part in ("attention", "qkv") else part
    return part in ("", "use", "add", "with") or any(
        part in path or (part == "attn" and "attention" in path) for path in paths
    )
