"""Where a module has the batch: in which dimension of which argument and result, and how many rows a sample has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

# Note [Where the batch is]
# A route is given the batch's dimension for all of the model. Some modules say themselves that theirs is another, or
# have it in other dimensions of their masks, states and attention weights; and some classes of transformers are known
# to call layers with `(tokens, batch, features)` between others that get `(batch, tokens, features)`. Both are taken
# at their word. Whatever else looks like another order is refused, since rows themselves do not tell whose they are.

_CONVOLUTIONS = tuple(getattr(nn, f"Conv{transposed}{axes}d") for axes in (1, 2, 3) for transposed in ("", "Transpose"))

_NORMS = tuple(getattr(nn, f"{kind}Norm{axes}d") for axes in (1, 2, 3) for kind in ("Batch", "Instance"))


@dataclass(frozen=True)
class Layout:
    """Where a module has the batch.

    Attributes:
        dim: of its first argument.
        ndim: how many dimensions the first argument has with a batch; None for any from 2.
        names: of the arguments, in order.
        arguments: those that have it elsewhere: None where they have none.
        results: of the results that have it elsewhere, by position.
        channels: the dimension of the features.
    """

    dim: int
    ndim: int | None = None
    names: tuple[str, ...] = ()
    arguments: Mapping[str, int | None] = field(default_factory=dict[str, int | None])
    results: Mapping[int, int] = field(default_factory=dict[int, int])
    channels: int = -1


_MASKS = "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"

# Classes of transformers whose layers get `(tokens, batch, features)`, and the layers, as a regex on their path below.
_TOKENS_FIRST = {
    ("fsmt", "EncoderLayer"): ".*",
    ("fsmt", "DecoderLayer"): ".*",
    ("led", "LEDEncoderSelfAttention"): ".*",
    ("longformer", "LongformerSelfAttention"): ".*",
    ("mlcd", "MLCDAttention"): "out_proj",
    ("xlnet", "XLNetRelativeAttention"): ".*",
    ("xlnet", "XLNetFeedForward"): ".*",
    ("mask2former", "Mask2FormerMaskedAttentionDecoderLayer"): r"fc\d|.*norm",
    ("oneformer", "OneFormerTransformerDecoderFFNLayer"): ".*",
    ("oneformer", "OneFormerTransformerDecoderQueryTransformerDecoderLayer"): r"linear\d|norm\d",
}


def layout_of(module: nn.Module, dim: int) -> Layout:
    """Where a module has the batch, that a route says is in dimension `dim` (Note [Where the batch is])."""
    if isinstance(module, nn.MultiheadAttention):
        dim = 0 if module.batch_first else 1
        return Layout(dim, 3, ("query", "key", "value", *_MASKS), {"key_padding_mask": 0, "attn_mask": None}, {1: 0})
    if isinstance(module, _NORMS):
        return Layout(0, channels=1)
    if isinstance(module, _CONVOLUTIONS):
        return Layout(0, len(cast("tuple[int, ...]", module.kernel_size)) + 2, channels=1)
    return Layout(dim)


def tokens_first(model: Iterable[tuple[str, nn.Module]]) -> set[int]:
    """The ids of the modules that are known to get `(tokens, batch, features)`; given every module with its path."""
    found, below = set[int](), list[tuple[str, str]]()
    for path, module in model:
        for above, regex in below:
            if path.startswith(above) and re.fullmatch(regex, path.removeprefix(above)):
                found.add(id(module))
        for kind in type(module).__mro__:
            family = kind.__module__.removeprefix("transformers.models.").partition(".")[0]
            if (family, kind.__name__) in _TOKENS_FIRST:
                below.append((f"{path}." if path else "", _TOKENS_FIRST[family, kind.__name__]))
    return found


def gathers(path: str, experts: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether a module may be given tokens that a router has picked, rather than each sample's own one after the other.

    A layer inside of one expert is. All experts at once are not, where they get each token's choice beside the tokens.

    Args:
        path: the module's.
        experts: whether it holds a batch of matrices.
        tensors: its arguments that are tensors.
    """
    first, *others = tensors
    if first.ndim != 2:
        return False
    if re.search(r"(^|\.)experts?\.", path):
        return True
    chosen = [t for t in others if t.ndim == 2 and len(t) == len(first) and not t.is_floating_point()]
    return experts and not chosen
