"""What stands under torch's `parametrizations` of an adapted module: for each tensor, every adapter's part by name.

`Weight` turns W0 into W', `Bias` turns b0 into b'. Each knows only its own tensor; `glora.layer.adapted` brings them
together.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora import functional
from glora.config import GLoRAConfig
from glora.functional import Factors, WeightFactors
from glora.kernels.row_blocks import thin_product
from glora.layer.acting import Acting, Scales
from glora.layer.factors import LowRank, Vector, init_size
from glora.matrices import LINEAR, Matrix
from glora.precision import wide, working_dtype
from glora.quantised import dense
from glora.sharding import replicated_like

# Note [Named adapters live in one parametrization]
# Parametrizations stacked on one tensor compose: the second would see the first one's W' as its W0. Adapters add up
# against one W0, whatever their order: W0 + sum_i w_i (W0 * A_i + B_i). So they live side by side in one
# parametrization, under their names, and `Acting` says which act.


class Adapters(nn.Module):
    """The parts of several adapters for one tensor; the base of Weight, Bias and Head.

    Args:
        acting: the module's.
    """

    def __init__(self, acting: Acting | None = None) -> None:
        super().__init__()
        self.acting = Acting() if acting is None else acting
        self._saved_requires_grad: dict[str, dict[str, bool]] = {}

    def parts(self) -> dict[str, nn.Module]:
        """Adapter name to part, in the order of attaching."""
        return cast("dict[str, nn.Module]", self._modules)

    def is_active(self) -> bool:
        """Whether an adapter that acts has a part here."""
        return any(name in self._modules for name in self.acting.scales)

    def extra_repr(self) -> str:
        """The adapters that act, with their scales, for `print(layer)`."""
        acting = {name: scale for name, scale in self.acting.scales.items() if name in self._modules}
        return ", ".join(f"{name}={scale.item():g}" for name, scale in acting.items()) or "none acts"

    def detach(self, name: str) -> None:
        """Drop an adapter's part, if there is one."""
        self._modules.pop(name, None)
        self._saved_requires_grad.pop(name, None)

    def may_train(self, name: str) -> bool:
        """Whether this adapter's part may ask for a gradient: where it acts."""
        return name in self.acting.scales

    def match_flags(self) -> None:
        """Freeze the parts that may not train; the others get back the flags that they had when they last did."""
        for name, part in self.parts().items():
            if self.may_train(name):
                flags = self._saved_requires_grad.get(name, {})
                for key, parameter in part.named_parameters() if flags else ():
                    parameter.requires_grad_(flags[key])
                self._saved_requires_grad.pop(name, None)  # last: cut off before, it is done again
            else:
                parameters = dict(part.named_parameters())
                self._saved_requires_grad.setdefault(name, {key: p.requires_grad for key, p in parameters.items()})
                for parameter in parameters.values():
                    parameter.requires_grad_(False)


class Paths(nn.Module):
    """One adapter's paths on one tensor: A and B on a weight, or C, D and E on a bias; those that are not none.

    Args:
        config: the adapter's config for this layer.
        names: the paths to build.
        weight: the frozen weight as a matrix, `(out, in)`, or a batch of them; gives shapes, device and dtype (float32
            at least).
    """

    def __init__(self, config: GLoRAConfig, names: tuple[str, ...], weight: Tensor) -> None:
        super().__init__()
        self.config = config
        *batch, out_features, in_features = weight.shape
        shapes, dtype = config.shapes(out_features, in_features, names, tuple(batch)), working_dtype(weight)
        tensors = {key: torch.empty(shape, dtype=dtype, device=weight.device) for key, shape in shapes.items()}
        tensors = {key: replicated_like(weight, tensor) for key, tensor in tensors.items()}
        for name in names:
            if config.forms[name] == "lora":
                path = LowRank(tensors[f"{name}.left"], tensors[f"{name}.right"], config)
            else:
                path = Vector(tensors[f"{name}.value"])
            self.add_module(name, path)

    def paths(self) -> dict[str, LowRank | Vector]:
        """Path to module."""
        return cast("dict[str, LowRank | Vector]", self._modules)

    def factors(self, scale: Tensor, dropout: bool) -> dict[str, Factors]:
        """Path to raw tensors and their scale."""
        return {name: path.factors(scale, dropout) for name, path in self.paths().items()}

    def reset_parameters(self, weight: Tensor) -> None:
        """Start again, as `config.init` says, for a layer with this frozen weight as a matrix."""
        for name, path in self.paths().items():
            path.reset_parameters(init_size(name, self.config, weight))


class Weight(Adapters):
    """On a weight: `W0 + sum_i w_i (W0 * A_i + B_i)` over the adapters i that act.

    Args:
        acting: the module's.
        matrix: how the tensor is one (Note [Matrices]).
    """

    def __init__(self, acting: Acting | None = None, matrix: Matrix = LINEAR) -> None:
        super().__init__(acting)
        self.matrix = matrix

    def forward(self, W0: Tensor, scales: Scales | None = None, dropout: bool = False) -> Tensor:
        """The adapted weight, of W0's shape and dtype; W0 itself where no adapter acts."""
        factors, matrix = self.factors(self.acting.scales if scales is None else scales, dropout), self.matrix
        if matrix.is_plain:
            return functional.adapted_weight(dense(W0) if factors else W0, factors)
        read = matrix.read(W0)
        updates = [u.expand_as(read) for u in functional.weight_updates(read, factors) if u is not None]
        return functional.add(W0, [matrix.write(update, W0) for update in updates])

    def factors(self, scales: Scales, dropout: bool = False) -> list[WeightFactors]:
        """What each adapter that acts does to the weight."""
        found: list[WeightFactors] = []
        for name, scale in scales.items():
            part = cast("Paths | None", self._modules.get(name))
            if part is not None:
                factors = part.factors(scale, dropout)
                found.append(WeightFactors(factors.get("A"), factors.get("B"), part.config.product))
        return found


class Bias(Adapters):
    """On a bias: `b0 + sum_i w_i (b0 * D_i + E_i + W0 C_i)` over the adapters i that act.

    Args:
        acting: the module's.
        matrix: the weight that it is the bias of.
        created: the layer has no bias of its own; this one is there for the paths alone.
    """

    # Note [Bias needs the frozen weight]
    # C multiplies W0, which stands under the other tensor's parametrization. `glora.layer.adapted` hands it in at each
    # call; a reference kept here would go stale whenever the parameter is replaced (`to_empty`, FSDP, functional_call).
    # Torch's `remove_parametrizations(layer, "weight")` writes W' into the very tensor that held W0. A layer that has a
    # C then keeps W0 here, as a buffer that moves, copies and saves with the model.
    frozen_weight: Tensor | None

    def __init__(self, acting: Acting | None = None, matrix: Matrix = LINEAR, created: bool = False) -> None:
        super().__init__(acting)
        self.matrix, self.created = matrix, created
        self.register_buffer("frozen_weight", None)
        self.last_read: weakref.ref[Tensor] | None = None

    def forward(
        self, b0: Tensor, W0: Tensor | None = None, scales: Scales | None = None, dropout: bool = False
    ) -> Tensor:
        """The adapted bias, of b0's shape and dtype, from W0 as it is held; b0 itself where no adapter acts."""
        if W0 is None:
            raise RuntimeError(
                "A bias adapted by glora needs its layer's frozen weight, and was computed without it. Read the `bias` "
                "of the layer that glora.apply adapted; its parametrization cannot be moved to another layer."
            )
        updates: list[Tensor | None] = []
        for name, scale in (self.acting.scales if scales is None else scales).items():
            part = cast("Paths | None", self._modules.get(name))
            if part is not None:
                updates += self._updates(part.factors(scale, dropout), scale, b0, W0)
        return functional.add(b0, updates)

    def _updates(self, paths: dict[str, Factors], scale: Tensor, b0: Tensor, W0: Tensor) -> list[Tensor | None]:
        """What one adapter adds to b0. Vectors and constants have one scale in common, the adapter's own."""
        vectors = {path: wide(found.tensors) for path, found in paths.items() if isinstance(found.tensors, Tensor)}
        prompt = _prompted(self.matrix.read(W0), vectors["C"]) if "C" in vectors else None
        own = functional.bias_update(b0, prompt, vectors.get("D"), vectors.get("E"))
        updates = [None if own is None else own * scale]
        if "C" in paths and "C" not in vectors:
            updates.append(_prompted(self.matrix.read(W0), paths["C"].scaled()))
        return updates

    def detach(self, name: str) -> None:
        """As for all adapters; the kept weight goes with the last C."""
        super().detach(name)
        if not self.has_prompt():
            self.frozen_weight = None

    def has_prompt(self) -> bool:
        """Whether any adapter, active or not, has a path C."""
        return any("C" in part._modules for part in self.parts().values())


def _prompted(W0: Tensor, C: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return functional.prompted(W0, C) if W0.ndim > 2 else thin_product(W0, functional.whole(C)).squeeze(1)


# Note [Merged for a while]
# Inside `glora.merged` a module is plain: its class, its keys and its tensors are those of a merged one, and what
# parametrized it is held here. It is no attribute of the module, so that a deep copy made inside is a plain merged
# model for good, and not one that waits for the end of a block that it is not in.
stashed: weakref.WeakKeyDictionary[nn.Module, Stash] = weakref.WeakKeyDictionary()


class Stash(NamedTuple):
    """What a module that is plain for a while was: torch's lists of parametrizations, and its class."""

    lists: nn.ModuleDict
    adapted_class: type[nn.Module]  # the registry holds it weakly


Stacks: TypeAlias = dict[str, parametrize.ParametrizationList]


def live_stacks(module: nn.Module) -> Stacks:
    """Tensor name to what parametrizes it now."""
    lists = module._modules.get("parametrizations")
    return cast("Stacks", lists._modules) if isinstance(lists, nn.ModuleDict) else {}


def stacks_of(module: nn.Module) -> Stacks:
    """Tensor name to what parametrizes it, stashed or not (Note [Merged for a while])."""
    stash = stashed.get(module) if stashed else None
    return live_stacks(module) if stash is None else cast("Stacks", stash.lists._modules)


def adapters_of(module: nn.Module) -> dict[str, Adapters]:
    """Tensor name to the adapters on it, for the tensors of this very module that glora parametrizes.

    In the order of the module's own tensors, whatever was attached first: optimizers' state dicts go by the order.
    """
    stacks, found = stacks_of(module), dict[str, Adapters]()
    for name in (*module._parameters, *module._buffers) if stacks else ():
        first = stacks[name]._modules["0"] if name in stacks else None
        if isinstance(first, Adapters):
            found[name] = first
    return found


def biases_of(module: nn.Module) -> dict[str, Bias]:
    """Tensor name to the adapters on it, for the biases alone."""
    return {name: store for name, store in adapters_of(module).items() if isinstance(store, Bias)}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers by name, those of the base model where adapters are on them."""
    tensors = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }
    for name in adapters_of(module) if is_adapted(module) else ():
        tensors[name] = stacks_of(module)[name].original
    return tensors


def is_adapted(module: nn.Module) -> bool:
    """Whether the module may carry adapters, stashed or not."""
    return hasattr(type(module), "_glora_adapted") or (bool(stashed) and module in stashed)


def has_adapted_class(module: nn.Module) -> bool:
    """Whether the module's class is one of glora's itself, and not one that somebody (FSDP) has put on top."""
    return "_glora_adapted" in vars(type(module))
