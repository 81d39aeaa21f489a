"""All forms of a layer's paths, from one set of tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from glora.config import GLoRAConfig
from glora.functional import Factors
from glora.layer.factors import FrozenPrompt, LowRank, Vector
from glora.layer.parametrization import Paths
from glora.search.space import Space
from glora.torch_internals import in_backward, not_compiled


# Note [Entangled]
# The parameters are those of the largest config, an ordinary one. Every other form is their leading corner, in the
# shape that its own config gives it: the vector is column 0 of `left`, the constant its entry [0, 0], rank r the first
# r columns of `left` and rows of `right`. So all forms train the same numbers. Each is scaled as its own config scales
# it: a vector or constant by 1, a product of rank r by `alpha / r` (by 1 where alpha is None).
class Entangled(Paths):
    """One layer's paths on one tensor, in any form of a space (Note [Entangled]).

    Args:
        owner: path of the layer.
        adapter: name of the supernet.
        space: the supernet's; `names` are the paths that exist here.
        seed: of the draws in training.
        names: the paths to build.
        weight: the layer's frozen weight, `(out, in)`.

    Attributes:
        chosen: the config that acts; None for a draw in training and the largest in eval.
    """

    def __init__(
        self, owner: str, adapter: str, space: Space, seed: int, names: tuple[str, ...], weight: Tensor
    ) -> None:
        super().__init__(space.largest, names, weight)
        self.owner, self.adapter, self.full_space, self.space = owner, adapter, space, space.only(*names)
        self.chosen: GLoRAConfig | None = None
        self.draws = Draws(f"{seed} {owner} {names}")
        self.weight_shape = tuple(weight.shape)

    def factors(self, adapter_weight: Tensor, dropout: bool) -> dict[str, Factors]:
        """Path to tensors and their scale, in the forms chosen; in a layer's forward in training, in those drawn."""
        config = self.chosen or (draw(self.draws, self.space) if dropout else self.config)
        tensors = self.tensors(config)
        low_rank_scale = adapter_weight if config.alpha is None else adapter_weight * config.scaling
        factors: dict[str, Factors] = {}
        for name, path in self._modules.items():
            if isinstance(path, FrozenPrompt):
                factors[name] = path.factors(adapter_weight)
            elif f"{name}.left" in tensors:
                factors[name] = Factors((tensors[f"{name}.left"], tensors[f"{name}.right"]), low_rank_scale)
            elif f"{name}.value" in tensors:
                factors[name] = Factors(tensors[f"{name}.value"], adapter_weight)
        return factors

    def shapes(self, config: GLoRAConfig) -> dict[str, tuple[int, ...]]:
        """Key to shape of each tensor that a config has here."""
        *batch, out_features, in_features = self.weight_shape
        names = [name for name, path in self._modules.items() if not isinstance(path, FrozenPrompt)]
        return config.shapes(out_features, in_features, names, tuple(batch))

    def tensors(self, config: GLoRAConfig) -> dict[str, Tensor]:
        """Key to tensor of a config: corners of the largest's."""
        return {key: self._corner(key, shape, config) for key, shape in self.shapes(config).items()}

    def _corner(self, key: str, shape: tuple[int, ...], config: GLoRAConfig) -> Tensor:
        name, _, factor = key.partition(".")
        path = self.paths()[name]
        tensor = path.value if isinstance(path, Vector) else path.right if factor == "right" else path.left
        if factor == "value" and isinstance(path, LowRank) and name == "A" and config.product == "matmul":
            tensor = tensor.mT  # a vector A of this product is a row
        ones = (1,) * (tensor.ndim - len(shape))
        return tensor[tuple([slice(size) for size in (*shape, *ones)])].reshape(shape)

    def extracted(self, config: GLoRAConfig) -> Paths | None:
        """Ordinary paths of a config, with copies of its tensors; None where all are none."""
        config = replace(config, balance="none")  # a supernet has none, whatever was chosen
        names = tuple([path for path in self.paths() if getattr(config, path) != "none"])
        if not names:
            return None
        plain = Paths(config, names, torch.empty(self.weight_shape, device="meta"))
        # Strides of their own: a corner of one number keeps those of the whole, which no file takes.
        copies = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in self.tensors(config).items()}
        plain.load_state_dict(copies, assign=True)
        return plain


# Note [Replayed draws]
# Activation checkpointing runs a layer a second time in the backward pass, which must give what the first gave. For
# dropout's sake it resets torch's global generator first. So each forward draws a key from that generator, and the
# config is stored under the key: the replay meets the key again. A new key inside a backward pass belongs to a replay
# whose first run is unknown; it is refused, since its gradients would be wrong.
#
# The forms come from a generator of the part's own, all of them equally likely (the paper's uniform draw).
_PENDING = 1024  # forwards of one layer between a forward and its backward, at most


class Draws:
    """The configs that one part of a supernet draws, forward by forward (Note [Replayed draws])."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.drawn: dict[int, GLoRAConfig] = {}

    def next(self, space: Space) -> GLoRAConfig:
        """The forms of one forward, for the paths of this space."""
        key = int(torch.randint(2**62, ()))
        if key not in self.drawn:
            if in_backward():
                raise RuntimeError(
                    "A supernet in training draws its forms anew in each forward, and activation checkpointing could "
                    "not replay them: keep its preserve_rng_state=True, or choose the forms (glora.search.choose)."
                )
            forms = {path: self.random.choice(forms) for path, forms in space.forms.items()}
            self.drawn[key] = space.config(forms, self.random.choice(space.ranks))
            if len(self.drawn) > _PENDING:
                del self.drawn[next(iter(self.drawn))]
        return self.drawn[key]


# Not compiled: the draw is data of each call.
draw: Callable[[Draws, Space], GLoRAConfig] = not_compiled(Draws.next)  # as in routed
