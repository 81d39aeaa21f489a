"""All forms of a layer's paths, from one set of tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from glora.config import GLoRAConfig
from glora.functional import Factors
from glora.layer.factors import LowRank, Vector
from glora.layer.parametrization import Paths
from glora.search.space import Space

_Choice = TypeVar("_Choice")


# Note [Entangled]
# The parameters are those of the largest config, an ordinary one, and every other form is a part of them: the vector is
# column 0 of `left`, the constant its entry [0, 0], rank r the first r columns of `left` and rows of `right`. So what
# one form learns the others inherit. A form is scaled as the config of its own would be: a vector or constant by 1, a
# product of rank r by `alpha / r` (by 1 where alpha is None), whatever the largest rank is.
class Entangled(Paths):
    """One layer's paths on one tensor, in any form of a space (Note [Entangled]).

    Args:
        owner: path of the layer.
        adapter: name of the supernet.
        space: what may be chosen; other paths than `names` are none.
        seed: of what is drawn in training.
        config: the largest choice.
        names: the paths to build.
        weight: the layer's frozen weight, `(out, in)`.

    Attributes:
        chosen: what acts; None for a draw in training and the largest elsewhere.
    """

    def __init__(
        self,
        owner: str,
        adapter: str,
        space: Space,
        seed: int,
        config: GLoRAConfig,
        names: tuple[str, ...],
        weight: Tensor,
    ) -> None:
        super().__init__(config, names, weight)
        self.owner, self.adapter, self.whole_space, self.space = owner, adapter, space, space.only(*names)
        self.chosen: GLoRAConfig | None = None
        self.drawn = Draws(f"{seed} {owner} {names}")
        self._shape, self._by_columns = tuple(weight.shape), space.product == "matmul"

    def factors(self, adapter_weight: Tensor, dropout: bool) -> dict[str, Factors]:
        """Path to tensors and their scale, in the forms chosen; in a layer's forward in training, in those drawn."""
        config = self.chosen
        if config is None:
            config = draw(self.drawn, self.space) if dropout else self.config
        return self.factors_of(config, adapter_weight)

    def factors_of(self, config: GLoRAConfig, scale: Tensor) -> dict[str, Factors]:
        """The same in the forms of a config."""
        return {
            name: self._part_of(path, getattr(config, name), config, scale, across=name == "A" and self._by_columns)
            for name, path in self.paths().items()
            if getattr(config, name) != "none"
        }

    def count(self, path: str, form: str, rank: int) -> int:
        """How many numbers a path has in this form; 0 for one that is not here."""
        if path not in self.paths() or form == "none":
            return 0
        tensors = self.factors_of(self.space.config({path: form}, rank), torch.ones(()))[path].tensors
        return tensors.numel() if isinstance(tensors, Tensor) else sum(tensor.numel() for tensor in tensors)

    def extracted(self, config: GLoRAConfig) -> Paths | None:
        """Ordinary paths of a config, with copies of its parts of the tensors; None where all are none."""
        factors = self.factors_of(config, torch.ones(()))
        if not factors:
            return None
        plain = Paths(config, tuple(factors), torch.empty(self._shape, device="meta"))
        for name, path in plain.paths().items():
            tensors = factors[name].tensors
            if isinstance(path, LowRank):
                path.left, path.right = (nn.Parameter(tensor.detach().clone()) for tensor in tensors)
            elif isinstance(tensors, Tensor):
                path.value = nn.Parameter(tensors.detach().clone())
        return plain

    def _part_of(
        self, path: LowRank | Vector, form: str, config: GLoRAConfig, scale: Tensor, *, across: bool
    ) -> Factors:
        """A form's part of the tensors; `across`: of a path that scales the columns of the weight, and not its rows."""
        if isinstance(path, Vector):
            return path.factors(scale) if form == "vector" else Factors(self._first(path.value), scale)
        if form == "lora":
            tensors = path.left[..., : config.rank], path.right[..., : config.rank, :]
            return Factors(tensors, scale if config.alpha is None else scale * config.scaling)
        column = path.left[..., :1]
        if form == "vector":
            return Factors(column.mT if across else column, scale)
        return Factors(self._first(column), scale)

    def _first(self, tensor: Tensor) -> Tensor:
        """The first number of a tensor, `(1,)`; of each in a batch, `(batch, 1, 1)`, or `(batch, 1)` on a bias."""
        batch = len(self._shape) - 2
        return tensor[(..., *[slice(1)] * (tensor.ndim - batch))] if batch else tensor.flatten()[:1]


# Note [Replayed draws]
# Activation checkpointing runs a layer a second time in the backward pass, which must give what the first gave. For
# dropout's sake it sets torch's global generator back first. So each forward draws a key from there, and the forms go
# by the key: one that is met again gets the forms that it had. A forward inside of a backward pass whose key is new is
# one whose first run is not known, and is refused: its gradients would be wrong.
#
# The forms themselves come from a generator of their own. Each path deals its forms like cards, all of them once
# before any of them twice, so that each is trained equally often.
_PENDING = 1024  # forwards of one layer between a forward and its backward, at most


class Draws:
    """What a part of a supernet draws, forward by forward (Note [Replayed draws])."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.decks: dict[str, list[Any]] = {}
        self.known: dict[int, GLoRAConfig] = {}

    def next(self, space: Space) -> GLoRAConfig:
        """The forms of one forward, for the paths of this space."""
        key = int(torch.randint(2**62, ()))
        if key not in self.known:
            if torch._C._current_graph_task_id() != -1:  # pyright: ignore - torch leaves it untyped
                raise RuntimeError(
                    "A supernet in training draws its forms anew in each forward, and activation checkpointing could "
                    "not replay them: keep its preserve_rng_state=True, or choose the forms (glora.search.choose)."
                )
            forms = {path: self._deal(path, forms) for path, forms in space.forms.items()}
            self.known[key] = space.config(forms, self._deal("rank", space.ranks))
            if len(self.known) > _PENDING:
                del self.known[next(iter(self.known))]
        return self.known[key]

    def _deal(self, name: str, choices: Sequence[_Choice]) -> _Choice:
        deck = self.decks.setdefault(name, [])
        if not deck:
            deck += self.random.sample(choices, len(choices))
        return deck.pop()


# Not compiled: what is drawn is data of each call.
draw: Callable[[Draws, Space], GLoRAConfig] = _disable_dynamo(Draws.next)  # as in routed
