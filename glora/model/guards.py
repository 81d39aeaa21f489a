"""Methods of other libraries that would replace, bypass or recast adapted modules, refused while adapters are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from glora.model.huggingface import embeddings
from glora.model.records import Plan
from glora.model.walk import Owner, adapted_owners
from glora.text import format_names

# Note [Guarded methods]
# transformers' `resize_token_embeddings` gives the embedding other memory and the output layer another module;
# diffusers' `fuse_qkv_projections` computes with a new layer in place of three, and `enable_layerwise_casting` stores
# factors in 8 bits. None knows of adapters, which would go on unused, cut or destroyed without a word. So each module
# that has such a method gets one of its own, as an attribute of the instance, which looks first (as for
# `save_pretrained`, Note [Exports]).


class Guard:
    """A guarded method of one module while adapters may be on it; it refers to its module, for deep copies' sake."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the class does, where no adapter is in its way.

        Raises:
            RuntimeError: adapters are; nothing has changed.
        """
        asks_only = self.method == "resize_token_embeddings" and not args and not kwargs  # it gives the embedding
        found = [] if asks_only else [owner.place for owner in _GUARDED[self.method](self.module)]
        if found:
            raise RuntimeError(
                f"{self.method} would leave adapters behind on modules that it replaces, bypasses or casts; they are "
                f"on {format_names(found)}. Nothing has changed. Call it before glora.apply or glora.load (glora.save "
                f"the adapter and glora.remove it first; a head of another size starts anew), or after glora.merge."
            )
        before = embeddings(self.module)
        result = getattr(type(self.module), self.method)(self.module, *args, **kwargs)
        after = embeddings(self.module)
        for old, new in zip(before, after, strict=False):
            if new is not old and "_glora_flags" in vars(old):  # Note [Flags]: frozen as what it replaces
                vars(new)["_glora_flags"] = vars(old)["_glora_flags"]
        return result


def _embeddings(module: nn.Module) -> Iterator[Owner]:
    ids = set(map(id, embeddings(module)))
    return (owner for owner in adapted_owners(module) if id(owner.module) in ids)


_PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
_PARTS["to_added_qkv"] = ("add_q_proj", "add_k_proj", "add_v_proj")


def _projections(module: nn.Module) -> Iterator[Owner]:
    """The adapted projections of the attentions that can be fused."""
    names = {*_PARTS, *(part for parts in _PARTS.values() for part in parts)}
    ids = {
        id(child) for each in module.modules() if _can_fuse(each) for n, child in each.named_children() if n in names
    }
    return (owner for owner in adapted_owners(module) if id(owner.module) in ids)


_GUARDED: dict[str, Callable[[nn.Module], Iterable[Owner]]] = {
    "resize_token_embeddings": _embeddings,
    "fuse_qkv_projections": _projections,
    "unfuse_qkv_projections": _projections,
    "fuse_projections": _projections,
    "unfuse_projections": _projections,
    "enable_layerwise_casting": adapted_owners,
}


def guard(walk: Iterable[Owner]) -> None:
    """Give each module that has such methods guarded ones."""
    for owner in walk:
        for method in _GUARDED:
            if hasattr(type(owner.module), method):
                vars(owner.module).setdefault(method, Guard(owner.module, method))


def unguard(walk: Iterable[Owner]) -> None:
    """Give each module back its class's methods."""
    for owner in walk:
        for method in [method for method in _GUARDED if isinstance(vars(owner.module).get(method), Guard)]:
            del vars(owner.module)[method]


def _can_fuse(module: nn.Module) -> bool:
    return hasattr(type(module), "fuse_projections")


def refuse_bypassed(walk: Iterable[Owner], planned: Plan) -> None:
    """Raise ValueError where a planned layer stands beside one that diffusers has fused it into, or the reverse."""
    unused: dict[int, str] = {}
    for owner in walk:
        for fused, parts in _PARTS.items() if _can_fuse(owner.module) else ():
            children = owner.module._modules
            if children.get(fused) is not None:
                idle = parts if _is_fused(owner.module) else (fused,)
                unused |= {id(children[name]): fused for name in idle if name in children}
    bypassed = [layer.path for layer in planned.layers if id(layer.module) in unused]
    if bypassed:
        raise ValueError(
            f"An adapter must be on layers that the model calls; diffusers' fused projections (to_qkv, to_kv) stand in "
            f"place of their parts or are left over, and {format_names(bypassed)} are not called. Target what is "
            f"called, or call unfuse_qkv_projections (to fuse: fuse_qkv_projections) first."
        )


def _is_fused(attention: nn.Module) -> bool:
    """Whether its forward takes the fused projections: by its flag, or in the older class by its processor."""
    if hasattr(type(attention), "unfuse_projections"):
        return bool(getattr(attention, "fused_projections", False))
    return "Fused" in type(getattr(attention, "processor", None)).__name__
