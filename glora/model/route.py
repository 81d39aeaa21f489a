"""One batch for several adapters: each sample through its own (Note [Routing])."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from torch import nn

from glora.layer import routed
from glora.layer.batched import layout_of, tokens_first
from glora.model.change import refuse_while_swapped
from glora.model.walk import Model, adapted_owners, owners
from glora.tensors import is_tensor_parallel
from glora.text import UnknownName, brief, choice, quote_names
from glora.undo import block


@block
def route(model: Model, names: Sequence[str | None], *, dim: int = 0, flattened: bool = False) -> Generator[Model]:
    """Run each sample of a batch through its own adapter, inside the `with` block.

    Args:
        model: the model. Its adapted layers must be called with the batch in one dimension, as nn.Linear is with
            `(batch, in)` or `(batch, tokens, in)`.
        names: for each sample the name of its adapter, which acts with weight 1; None for the base model. What is
            active outside of the block does not matter inside.
        dim: the batch's dimension. It is never guessed: a batch of as many tokens as samples looks the same. Modules
            that say it themselves need none: nn.MultiheadAttention by `batch_first`, convolutions, norms, and
            those layers of FSMT, LED, Longformer, MLCD and XLNet that get `(tokens, batch, in)`.
        flattened: allow layers that are called with several rows for each sample: `(batch * tokens, in)` (OPT, MoE).
            The model must keep the batch's order: all rows of a sample one after the other, and the samples as in
            `names`. It must not repeat the batch (`torch.cat([x, x])`; give a name for each row then), and not have
            samples of unequal shares (images of which one sample has two).

    Yields:
        The model. The outputs are those of each sample alone with its adapter active, heads included. Factors keep
        their `requires_grad` flags: those of adapters that are active outside train here as well.

    Other threads and tasks are not touched: each may be inside a route of its own. A thread that is started inside the
    block is not inside it.

    Raises:
        KeyError: a name that is not an adapter of the model.
        ValueError: no names, a dim that is no dimension; inside, a layer called with another number of samples or
            without a batch, with tokens that a router has picked or repeated (experts that are not given each token's
            choice), or flattened, with another number of tokens for each sample than in the layers before.
        RuntimeError: inside `glora.merged` or another `route`; inside, an adapted weight that is read rather than its
            layer called (nn.MultiheadAttention reads `out_proj.weight`), a result that is not one for each sample and
            differs between the adapters, activation checkpointing around a routed layer, or a call that changes
            adapters. Layers that `parallelize_module` has divided.

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
    refuse_while_swapped(model)
    if isinstance(names, (str, Mapping)) or not names:
        raise ValueError(
            f"names must hold one adapter's name, or None, for each sample; found {brief(names)}. Pass a list as long "
            f"as the batch, or let one adapter, or a weighted sum, act on all samples with glora.activate."
        )
    if type(dim) is not int or dim < 0:
        raise ValueError(f"dim must be the batch's dimension, an int of at least 0; found {dim!r}.")
    walk = adapted_owners(model)
    known = {name for owner in walk for name in owner.adapter_names}
    for name in names:
        if name is not None and name not in known:
            raise UnknownName(
                f"{name!r} is not an adapter of the model, which has {quote_names(sorted(known))}; None stands for the "
                f"base model. {choice(known)}"
            )
    for owner in walk:
        if any(is_tensor_parallel(owner.module, owner.tensors[name]) for name in owner.stores):
            raise RuntimeError(
                f"A batch cannot be routed through layers that parallelize_module has divided, as {owner.path!r}. "
                f"Activate one adapter at a time, or route in a model that is whole on each rank."
            )
        if isinstance(owner.module, nn.RNNBase) and len(set(names)) > 1:
            raise RuntimeError(
                f"A batch cannot be routed through recurrent modules, whose states have the batch in another dimension "
                f"than their inputs, as {owner.path!r}. Run each adapter's samples with glora.activate."
            )
    paths = {id(owner.module): owner.place for owner in walk}
    seconds = tokens_first([(owner.path, owner.module) for owner in owners(model)])
    layouts = {id(o.module): layout_of(o.module, 1 if id(o.module) in seconds else dim) for o in walk}
    routing = routed.Routing(names, {id(owner.module): owner.adapter_names for owner in walk}, layouts, flattened)
    with routed.enter(routed.Route(paths, routing, None)):
        yield model
