"""The modules in torch's `parametrizations` of an adapted module: for each tensor, every adapter's paths by name.

    layer.parametrizations.weight[0]: Weight    adapter name -> Paths: A, B
    layer.parametrizations.bias[0]: Bias        adapter name -> Paths: C, D, E

`Weight` turns W0 into W', `Bias` turns b0 into b'. Each knows its own tensor only; `glora.layer.computed` brings them
together.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora import functional
from glora.config import GLoRAConfig, Product
from glora.functional import ONE, Factors, WeightFactors, is_one
from glora.kernels.row_blocks import thin_product
from glora.layer.factors import FrozenPrompt, LowRank, Vector, balance_of, init_size
from glora.matrices import LINEAR, Matrix
from glora.precision import wide, working_dtype
from glora.tensors import dense, is_sharded, replicated_like
from glora.torch_internals import not_persistent

AdapterWeights: TypeAlias = Mapping[str, Tensor]
"""The adapters that act: name to weight, the w_i of `W0 + sum_i w_i (W0 * A_i + B_i)`."""

DISABLED: AdapterWeights = {}
"""No adapter acts, inside of a route neither: told from another empty mapping by identity."""

# Note [Adapter weights are tensors]
# An adapter's weight is a 0-dimensional float64 tensor on the CPU, and no buffer. A Python float would be a constant of
# a compiled graph, and each value would recompile it. A buffer would be cast by `.half()` and lost by `.to_empty()`.
# A 0-dimensional tensor takes no part in type promotion, and meets tensors of any device without a transfer.
#
# torch.compile specialises on such a tensor as on a Python number, and then retraces the whole graph. It takes a
# Parameter for a tensor at once; but torch.export wants every Parameter to belong to a module.


class Acting:
    """The adapters that act on one module. Its stores share this object: one assignment switches all of its tensors.

    Attributes:
        compiled: `adapter_weights` as Parameters, for torch.compile (Note [Adapter weights are tensors]).
    """

    def __init__(self) -> None:
        self.adapter_weights = {}

    @property
    def adapter_weights(self) -> AdapterWeights:
        """Replaced, never changed: a forward pass takes it once and keeps to it."""
        return self._adapter_weights

    @adapter_weights.setter
    def adapter_weights(self, adapter_weights: AdapterWeights) -> None:
        self.compiled: AdapterWeights = {
            name: nn.Parameter(weight, requires_grad=False) for name, weight in adapter_weights.items()
        }
        self._adapter_weights = adapter_weights

    def __deepcopy__(self, memo: dict[int, Any]) -> Acting:
        memo[id(self)] = replica = Acting()
        replica.adapter_weights = self.adapter_weights  # the very tensors: `ONE` is told by its identity
        return replica

    def of_a_call(self) -> AdapterWeights:
        """The adapter weights for a forward pass that begins here."""
        traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        return self.compiled if traced else self._adapter_weights


# Note [Named adapters live in one parametrization]
# Parametrizations stacked on one tensor compose: the second would take the first one's W' for its W0. Adapters add up
# on one W0, in any order: W0 + sum_i w_i (W0 * A_i + B_i). So they are side by side in one parametrization, under their
# names, and `Acting` says which act.


class Store(nn.Module):
    """Several adapters' paths, or copies, for one tensor; the base of Weight, Bias and Head.

    Args:
        acting: the module's.
    """

    acting: Acting

    def __init__(self, acting: Acting | None = None) -> None:
        super().__init__()
        vars(self)["acting"] = Acting() if acting is None else acting  # Note [Thousands of modules]

    def parts(self) -> dict[str, nn.Module]:
        """Adapter name to part, in the order of attaching."""
        return cast("dict[str, nn.Module]", self._modules)

    def is_active(self) -> bool:
        """Whether an adapter that acts is on this tensor."""
        return any(name in self._modules for name in self.acting.adapter_weights)

    def extra_repr(self) -> str:
        """The adapters that act, with their weights, for `print(layer)`."""
        acting = {name: weight for name, weight in self.acting.adapter_weights.items() if name in self._modules}
        return ", ".join(f"{name}={weight.item():g}" for name, weight in acting.items()) or "none acts"

    def detach(self, name: str) -> None:
        """Drop an adapter's part, if there is one."""
        self._modules.pop(name, None)

    def may_train(self, name: str) -> bool:
        """Whether this adapter's part may ask for a gradient: where it acts."""
        return name in self.acting.adapter_weights


class Paths(nn.Module):
    """One adapter's paths on one tensor: A and B on a weight, or C, D and E on a bias; those that are not none.

    Args:
        config: the adapter's config for this layer.
        names: the paths to build.
        weight: the frozen weight as a matrix, `(out, in)`, or a batch of them; gives shapes, device and dtype (float32
            at least).
    """

    config: GLoRAConfig
    product: Product  # the config's: a graph is guarded by each object that it reads from

    def __init__(self, config: GLoRAConfig, names: tuple[str, ...], weight: Tensor) -> None:
        super().__init__()
        vars(self).update(config=config, product=config.product)  # Note [Thousands of modules]
        *batch, out_features, in_features = weight.shape
        dtype, device, tensors = working_dtype(weight), weight.device, dict[str, Tensor]()
        for key, shape in config.shapes(out_features, in_features, names, tuple(batch)).items():
            tensors[key] = torch.empty(shape, dtype=dtype, device=device)
        if is_sharded(weight):
            tensors = {key: replicated_like(weight, tensor) for key, tensor in tensors.items()}
        for name in names:
            if getattr(config, name) == "lora":
                path = LowRank(
                    tensors[f"{name}.left"], tensors[f"{name}.right"], config, tensors.get(f"{name}.balance")
                )
            else:
                path = Vector(tensors[f"{name}.value"])
            self._modules[name] = path

    def paths(self) -> dict[str, LowRank | Vector]:
        """Path to module; a `FrozenPrompt` may be in the place of C."""
        return cast("dict[str, LowRank | Vector]", self._modules)

    def held(self) -> dict[str, Tensor]:
        """Key to tensor, `A.left`: parameters first, and then buffers."""
        paths = self._modules.items()
        parameters = {f"{name}.{key}": t for name, path in paths for key, t in path._parameters.items()}  # pyright: ignore
        return parameters | {f"{name}.{key}": t for name, path in paths for key, t in path._buffers.items()}  # pyright: ignore

    def take(self, config: GLoRAConfig) -> None:
        """Be those of another config, of the same forms and of this rank at most (Note [Hot swap])."""
        vars(self).update(config=config, product=config.product)
        for path in self.paths().values():
            if isinstance(path, LowRank):
                path.take(config)

    def factors(self, adapter_weight: Tensor, dropout: bool) -> dict[str, Factors]:
        """Path to raw tensors and their scale."""
        factors: dict[str, Factors] = {}
        for name, path in self._modules.items():
            factors[name] = path.factors(adapter_weight, dropout)  # pyright: ignore
        return factors

    # Note [Descriptions of state dicts]
    # Equal tensors under another alpha, or another product, are another adapter. So state dicts, torch's own and
    # `glora.state_dict`, carry both where torch keeps the versions of modules: in the attribute `_metadata`, which
    # torch.save keeps and a plain copy (`dict(state_dict)`, safetensors) loses. What carries none is taken as it is.

    def description(self) -> dict[str, float | str]:
        """What the tensors do not say by their shapes: the scale of low-rank paths, and the product of A."""
        description: dict[str, float | str] = {}
        if any(isinstance(path, LowRank) for path in self.paths().values()):
            description["alpha / rank"] = self.config.scaling
        if isinstance(self._modules.get("A"), LowRank):
            description["balance"] = self.config.balance
        if "A" in self._modules and self.config.A != "constant":
            description["product"] = self.config.product
        return description

    def _save_to_state_dict(self, destination: Any, *rest: Any, **named: Any) -> None:  # pyright: ignore
        super()._save_to_state_dict(destination, *rest, **named)  # pyright: ignore
        prefix: str = named["prefix"] if "prefix" in named else rest[0]
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["glora"] = self.description()

    def _load_from_state_dict(  # pyright: ignore
        self, state_dict: Any, prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        others = other_description(local_metadata.get("glora", {}), self.description())
        cast("list[str]", rest[-1]).extend(f"{prefix[:-1]}: {found}" for found in others)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # pyright: ignore

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor) -> None:
        """Start again as `config.init` says, on this frozen weight as a matrix."""
        for name, path in self.paths().items():
            size = init_size(name, self.config, weight)
            if name == "A" and isinstance(path, LowRank):
                path.reset_parameters(size, balance_of(self.config, weight))
            else:
                path.reset_parameters(size)


def other_description(given: Mapping[str, float | str], own: Mapping[str, float | str]) -> Iterator[str]:
    """Where a description that came with tensors is not an adapter's own, one sentence each."""
    for field, value in own.items():
        # Descriptions from before there was a balance do not have the field.
        found = given.get(field, "none" if given and field == "balance" else value)
        if found != value:
            yield f"{field} {found} in the state dict, {value} in the model"


class Weight(Store):
    """On a weight: `W0 + sum_i w_i (W0 * A_i + B_i)` over the adapters i that act.

    Args:
        acting: the module's.
        matrix: how the tensor is one (Note [Matrices]).
    """

    matrix: Matrix

    def __init__(self, acting: Acting | None = None, matrix: Matrix = LINEAR) -> None:
        super().__init__(acting)
        vars(self).update(matrix=matrix)

    def forward(self, W0: Tensor, adapter_weights: AdapterWeights | None = None, dropout: bool = False) -> Tensor:
        """The adapted weight, of W0's shape and dtype; W0 itself where no adapter acts."""
        factors = self.factors(self.acting.adapter_weights if adapter_weights is None else adapter_weights, dropout)
        if self.matrix.is_plain:
            return functional.adapted_weight(dense(W0) if factors else W0, factors)
        return functional.add(W0, self.updates(W0, factors))

    def updates(self, W0: Tensor, factors: Sequence[WeightFactors]) -> list[Tensor]:
        """What each adapter adds to W0, in W0's layout and the working dtype."""
        matrix = self.matrix.read(W0)
        updates = [u.expand_as(matrix) for u in functional.weight_updates(matrix, factors) if u is not None]
        return [self.matrix.write(update, W0) for update in updates]

    def factors(self, adapter_weights: AdapterWeights, dropout: bool = False) -> list[WeightFactors]:
        """The paths of each adapter that acts."""
        adapters: list[WeightFactors] = []
        for name, adapter_weight in adapter_weights.items():
            paths: Any = self._modules.get(name)  # no cast: it is a call, and this runs in every forward
            if paths is not None:
                factors: dict[str, Factors] = paths.factors(adapter_weight, dropout)
                adapters.append(WeightFactors(factors.get("A"), factors.get("B"), paths.product))
        return adapters


class Bias(Store):
    """On a bias: `b0 + sum_i w_i (b0 * D_i + E_i + W0 C_i)` over the adapters i that act.

    Args:
        acting: the module's.
        matrix: the weight that it is the bias of.
        created: the layer has no bias of its own; this one is there for the paths alone.

    Attributes:
        last_read: the last W' that was read without gradients, while it lives (Note [Removal order]).
    """

    matrix: Matrix
    created: bool
    last_read: weakref.ref[Tensor] | None

    # Note [Bias needs the frozen weight]
    # C multiplies W0, which is under the weight's parametrization. `glora.layer.computed` passes it in at each call; a
    # reference kept here would go stale whenever the parameter is replaced (`to_empty`, FSDP, functional_call).
    # Torch's `remove_parametrizations(layer, "weight")` writes W' into the very tensor that held W0. Each C is then
    # replaced by the vector W0 C (`FrozenPrompt`), a buffer that moves, copies and saves with the model.

    def __init__(self, acting: Acting | None = None, matrix: Matrix = LINEAR, created: bool = False) -> None:
        super().__init__(acting)
        vars(self).update(matrix=matrix, created=created, last_read=None)

    def forward(
        self, b0: Tensor, W0: Tensor | None = None, adapter_weights: AdapterWeights | None = None, dropout: bool = False
    ) -> Tensor:
        """The adapted bias, of b0's shape and dtype, from W0 as it is held; b0 itself where no adapter acts."""
        if W0 is None:
            raise RuntimeError(
                "A bias adapted by glora needs its layer's frozen weight, and was computed without it. Read the `bias` "
                "of the layer that glora.apply adapted; its parametrization cannot be moved to another layer."
            )
        updates: list[Tensor | None] = []
        for name, adapter_weight in (
            self.acting.adapter_weights if adapter_weights is None else adapter_weights
        ).items():
            paths = cast("Paths | None", self._modules.get(name))
            if paths is not None:
                updates += self._updates(paths, adapter_weight, dropout, b0, W0)
        return functional.add(b0, updates)

    def _updates(
        self, paths: Paths, adapter_weight: Tensor, dropout: bool, b0: Tensor, W0: Tensor
    ) -> list[Tensor | None]:
        """What one adapter adds to b0: its weight times D, E and C together, or a C with a scale of its own apart."""
        factors = paths.factors(adapter_weight, dropout)
        C, prompt, scaled_prompt = factors.get("C"), None, None
        if C is not None and C.scale.ndim:  # one number for each component (Note [Rank dropout])
            scaled_prompt = _product(self.matrix.read(W0), C.scaled())
        elif C is not None:
            is_frozen = isinstance(paths._modules["C"], FrozenPrompt)
            prompt = cast("Tensor", C.tensors) if is_frozen else _product(self.matrix.read(W0), C.tensors)
            if C.scale is not adapter_weight:
                prompt, scaled_prompt = None, prompt * C.scale
        D = cast("Tensor", factors["D"].tensors) if "D" in factors else None
        E = cast("Tensor", factors["E"].tensors) if "E" in factors else None
        update = functional.bias_update(b0, prompt, D, E)
        if update is not None and not is_one(adapter_weight):
            update = update * adapter_weight
        return [update, scaled_prompt]

    def has_prompt(self) -> bool:
        """Whether any adapter, active or not, has a path C that multiplies W0."""
        # A list, at once: another thread may attach an adapter meanwhile (Note [Never torn]).
        return any(isinstance(paths._modules.get("C"), (LowRank, Vector)) for paths in list(self.parts().values()))

    def has_frozen_prompt(self) -> bool:
        """Whether torch's removal has baked the weight in, and frozen each C (Note [Removal order])."""
        return any(isinstance(paths._modules.get("C"), FrozenPrompt) for paths in self.parts().values())

    def freeze_prompts(self, W0: Tensor) -> None:
        """Replace each adapter's path C by the vector W0 C."""
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could never be part of a training step
            for paths in cast("dict[str, Paths]", self.parts()).values():
                C = paths.paths().get("C")
                if C is not None:
                    shift = _product(self.matrix.read(W0), C.factors(ONE).tensors)
                    paths._modules["C"] = FrozenPrompt(shift, C.scaling if isinstance(C, LowRank) else 1.0)


def _product(W0: Tensor, C: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """`W0 C`, `(out,)`, in the working dtype."""
    if W0.ndim > 2:
        return functional.prompted(W0, C)
    return thin_product(W0, wide(C if isinstance(C, Tensor) else functional.whole(C))).squeeze(1)


# Note [Merged for a while]
# Inside `glora.merged` a module is plain: its class, keys and tensors are those of a merged one. Its parametrizations
# are stashed here, and not in an attribute of the module: a deep copy made inside is merged for good, since no block
# that ends would restore it.
stashed: weakref.WeakKeyDictionary[nn.Module, Stash] = weakref.WeakKeyDictionary()


class Stash(NamedTuple):
    """What `glora.merged` takes from a module for a while: torch's `parametrizations`, and its class."""

    parametrizations: nn.ModuleDict
    adapted_class: type[nn.Module]  # the registry of classes is weak


Parametrizations: TypeAlias = dict[str, parametrize.ParametrizationList]
"""Tensor name to torch's list of the parametrizations that compute it; glora's store is the first."""


def live_parametrizations(module: nn.Module) -> Parametrizations:
    """The parametrizations that the module has now."""
    parametrizations = module.__dict__.get("_modules", {}).get("parametrizations")
    return parametrizations._modules if isinstance(parametrizations, nn.ModuleDict) else {}  # pyright: ignore


def parametrizations_of(module: nn.Module) -> Parametrizations:
    """The parametrizations of the module, live or stashed (Note [Merged for a while])."""
    stash = stashed.get(module) if stashed else None
    return live_parametrizations(module) if stash is None else cast("Parametrizations", stash.parametrizations._modules)


def stores_of(module: nn.Module) -> dict[str, Store]:
    """Tensor name to the adapters on it, for the tensors of this very module.

    In the order of the module's tensors, and not of attaching: optimizers' state dicts go by the order.
    """
    # Another class may have taken the parametrizations over as a child, as SyncBatchNorm's conversion does.
    parametrizations, stores = parametrizations_of(module) if is_adapted(module) else {}, dict[str, Store]()
    for name in (*module._parameters, *module._buffers) if parametrizations else ():
        first = parametrizations[name]._modules["0"] if name in parametrizations else None
        if isinstance(first, Store):
            stores[name] = first
    return stores


def biases_of(module: nn.Module) -> dict[str, Bias]:
    """Tensor name to the adapters on it, for the biases only."""
    return {name: store for name, store in stores_of(module).items() if isinstance(store, Bias)}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers by name; those of the base model where adapters are on them."""
    left_out = not_persistent(module)
    tensors = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in left_out
    }
    for name in stores_of(module) if is_adapted(module) else ():
        tensors[name] = parametrizations_of(module)[name].original
    return tensors


def is_adapted(module: nn.Module) -> bool:
    """Whether the module may have adapters, live or stashed."""
    return hasattr(type(module), "_glora_adapted") or (bool(stashed) and module in stashed)


def has_adapted_class(module: nn.Module) -> bool:
    """Whether the module's class is glora's own, and not a subclass that FSDP has made of it."""
    return "_glora_adapted" in vars(type(module))
