"""One batch for several adapters: each sample through its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from glora.adapters import adapters, refuse_while_merged
from glora.parametrization import Adapters
from glora.tree import adapted

Model = TypeVar("Model", bound=nn.Module)

# Note [Routing]
# Every module that carries adapters, or an adapter's head, gets a forward of its own inside `route`: it splits what it
# is given along dimension 0 into one part for each adapter, lets that adapter alone act while the part passes through
# the module's forward, and puts the results together in the batch's order. Modules inside a module that has split (a
# head's children) find themselves within one adapter's part and pass it on whole.
#
# A tensor that is read outside of such a forward would be nobody's: `Adapters.routed` makes the reading raise
# (MultiheadAttention reads `out_proj.weight`, and so does a fused TransformerEncoderLayer).


@contextmanager
def route(model: Model, names: Sequence[str | None]) -> Generator[Model]:
    """Run each sample of a batch through its own adapter, inside the `with` block.

    Args:
        model: the model. Its adapted layers must be called with the batch in dimension 0, as nn.Linear is with
            `(batch, in)` or `(batch, tokens, in)`.
        names: for each sample the name of its adapter, which acts with weight 1; None for the base model. What is
            active outside of the block does not matter inside.

    Yields:
        The model. The outputs are those of each sample alone with its adapter active, heads included. Factors keep
        their `requires_grad` flags: those of adapters that are active outside train here as well.

    Raises:
        KeyError: a name that is not an adapter of the model.
        ValueError: no names; inside, a layer called with another number of samples.
        RuntimeError: inside `glora.merged` or another `route`; inside, an adapted weight that is read rather than its
            layer called (nn.MultiheadAttention reads `out_proj.weight`), or a call that changes adapters.

    Source: what `adapter_names` of Hugging Face PEFT does for a call, here for a block.

    Example:
        >>> import torch, glora
        >>> config = glora.GLoRAConfig(init="random")
        >>> model = glora.apply(glora.apply(torch.nn.Linear(4, 2), config=config, name="a"), config=config, name="b")
        >>> x = torch.randn(3, 4)
        >>> with glora.route(model, ["a", None, "b"]):
        ...     y = model(x)
        >>> torch.allclose(y[2], model(x)[2], atol=1e-6)
        True
    """
    refuse_while_merged(model)
    if isinstance(names, str) or not names:
        raise ValueError(f"names must hold one adapter's name, or None, for each sample; found {names!r}.")
    there = adapters(model)
    for name in names:
        if name is not None and name not in there:
            raise KeyError(
                f"{name!r} is not an adapter of the model, which has {', '.join(map(repr, there)) or 'none'}; None "
                f"stands for the base model."
            )
    router = _Router(list(names))
    carriers = [(found.path or "the model itself", found.module, stores) for found, stores in adapted(model)]
    before = [(store, store.active) for _, _, stores in carriers for store in stores.values()]
    forwards = [(module, vars(module).get("forward")) for _, module, _ in carriers]
    try:
        for path, module, stores in carriers:
            for store in stores.values():
                store.routed = path
            vars(module)["forward"] = router.forward_of(path, module, list(stores.values()))
        yield model
    finally:
        for module, forward in forwards:
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        for store, active in before:
            store.routed, store.active = None, active


class _Router:
    """The samples of each adapter, and whose part is under way."""

    def __init__(self, names: list[str | None]) -> None:
        self.names = names
        self.groups = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
        order = [i for group in self.groups.values() for i in group]
        self.back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device="cpu")
        self.in_order = order == sorted(order)
        self.inside: list[str | None] = []
        self.weight = torch.tensor(1.0, dtype=torch.float64, device="cpu")

    def forward_of(self, path: str, module: nn.Module, stores: list[Adapters]) -> Callable[..., Any]:
        # What stood there before: an instance's own (accelerate puts one there), or the class's.
        forward = module.forward

        def run(name: str | None, *args: Any, **kwargs: Any) -> Any:
            before = [(store.active, store.routed) for store in stores]
            self.inside.append(name)
            try:
                for store in stores:
                    has_part = any(name == other for other, _ in store.parts())
                    store.active, store.routed = ({name: self.weight} if name and has_part else {}), None
                return forward(*args, **kwargs)
            finally:
                self.inside.pop()
                for store, (active, routed) in zip(stores, before, strict=True):
                    store.active, store.routed = active, routed

        def routed(*args: Any, **kwargs: Any) -> Any:
            if all(store.routed is None for store in stores):  # glora.disabled inside
                return forward(*args, **kwargs)
            if self.inside:
                return run(self.inside[-1], *args, **kwargs)
            self.check(path, (args, kwargs))
            if len(self.groups) == 1:
                return run(self.names[0], *args, **kwargs)
            results = [
                run(name, *self.part(args, group), **self.part(kwargs, group)) for name, group in self.groups.items()
            ]
            return self.together(results)

        # A compiled model steps out of its graph here: which samples go where is data of each call.
        disable: Any = torch.compiler.disable  # pyright: ignore - torch leaves it untyped
        return disable(routed)

    def check(self, path: str, given: object) -> None:
        found = next((leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)), None)
        samples = None if found is None else found.shape[0] if found.ndim > 1 else None
        if samples != len(self.names):
            shape = None if found is None else tuple(found.shape)
            raise ValueError(
                f"glora.route was given {len(self.names)} names, and {path!r} was called with an input of shape {shape}"
                f", whose dimension 0 is not that many samples. Give one name a sample, and the batch in dimension 0."
            )

    def part(self, given: Any, group: list[int]) -> Any:
        """The arguments for some samples: tensors that have the whole batch in dimension 0 are taken apart."""

        def of(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == len(self.names):
                first, last = group[0], group[-1]
                if last - first + 1 == len(group):
                    return leaf[first : last + 1]
                return leaf[torch.tensor(group, device=leaf.device)]
            return leaf

        return tree_map(of, given)

    def together(self, results: list[Any]) -> Any:
        """The results of the groups as those of one call, in the batch's order."""
        sizes = [len(group) for group in self.groups.values()]

        def join(*parts: Any) -> Any:
            if not isinstance(parts[0], Tensor) or [p.shape[:1] for p in parts] != [(size,) for size in sizes]:
                return parts[0]
            whole = torch.cat(parts)
            return whole if self.in_order else whole[self.back.to(whole.device)]

        return tree_map(join, *results)
