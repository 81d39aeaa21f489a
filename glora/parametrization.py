"""The modules that `torch.nn.utils.parametrize` holds for an adapted tensor: every adapter's part of it, by name.

`Weight` turns W0 into W', `Bias` turns b0 into b', `Head` turns a tensor of a trainable module into the active
adapter's own copy of it. Each knows only its own tensor; `glora.layer` brings them together.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from glora import functional, paths
from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.functional import Product
from glora.ways import Scaled, Update

# Note [Named adapters live in one parametrization]
# Parametrizations stacked on one tensor compose: the second would see the first one's W' as its W0. Adapters add up
# against one W0, whatever their order: W0 + sum_i w_i (W0 * A_i + B_i). So they live side by side in one
# parametrization, under their names, and `active` says which act. It is a plain dict that is replaced, never changed:
# its identity tells whether a value cached under `parametrize.cached()` is still that of the adapters that act.

# Note [Strengths are tensors]
# An adapter's weight w_i is a 0-dimensional float64 tensor on the CPU, and no buffer. As a Python float it would be
# compiled in, and recompiled for each value; as a buffer it would be cast by `.half()` and wiped by `.to_empty()`.
# Being 0-dimensional it takes part in no type promotion, and needs no transfer to meet a tensor of another device.


class Adapters(nn.Module):
    """The parts of several adapters for one tensor, of which some are active; the base of Weight, Bias and Head."""

    active: dict[str, Tensor]
    # The module's path while `glora.route` is at work and its forward is not running (Note [Routing]).
    routed: str | None

    def __init__(self) -> None:
        super().__init__()
        self.active = {}
        self.routed = None
        self._asleep: dict[str, dict[str, bool]] = {}

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Adapter name and part, in the order of attaching."""
        return iter(cast("dict[str, nn.Module]", self._modules).items())

    def attach(self, name: str, part: nn.Module) -> None:
        """Add an adapter's part; it acts once `activate` has been told so, which must follow."""
        self.add_module(name, part)

    def detach(self, name: str) -> None:
        """Drop an adapter's part, if there is one; `activate` must follow."""
        self._modules.pop(name, None)
        self._asleep.pop(name, None)
        self.active = {other: strength for other, strength in self.active.items() if other != name}

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Let exactly these adapters act, with these weights; those without a part here are passed over."""
        self.active = {
            name: torch.tensor(weight, dtype=torch.float64, device="cpu")
            for name, weight in strengths.items()
            if name in self._modules and weight != 0
        }
        self.match_flags()

    def match_flags(self) -> None:
        """Let only active factors ask for a gradient; they get back the flags that they had when they last acted."""
        for name, part in self.parts():
            if name not in self.active:
                self._sleep(name)
            elif name in self._asleep:
                flags = self._asleep.pop(name)
                for key, parameter in part.named_parameters():
                    parameter.requires_grad_(flags[key])

    def strengths(self) -> dict[str, float]:
        """Every adapter's weight, 0.0 where it is not active."""
        return {name: self.active[name].item() if name in self.active else 0.0 for name, _ in self.parts()}

    def invalidate(self) -> None:
        """Let no value cached before this call count (after factors were written in place)."""
        self.active = dict(self.active)

    def _sleep(self, name: str) -> None:
        if name not in self._asleep:
            parameters = dict(cast("nn.Module", self._modules[name]).named_parameters())
            self._asleep[name] = {key: parameter.requires_grad for key, parameter in parameters.items()}
            for parameter in parameters.values():
                parameter.requires_grad_(False)


class Paths(nn.Module):
    """One adapter's paths on one tensor: A and B on a weight, or C, D and E on a bias; those that are not none.

    Args:
        config: the adapter's config for this layer.
        names: the paths to build.
        weight: the layer's frozen weight, `(out, in)`; gives shapes, device and dtype (float32 at least).
    """

    def __init__(self, config: GLoRAConfig, names: tuple[str, ...], weight: Tensor) -> None:
        super().__init__()
        self.config = config
        self.product: Product = config.product
        self.dropout = config.rank_dropout
        self.built = {name: config.forms[name] for name in names}
        for name in names:
            module = paths.build(
                name,
                config.forms[name],
                weight,
                rank=config.rank,
                scaling=config.scaling,
                product=config.product,
                dtype=functional.working_dtype(weight),
            )
            self.add_module(name, module)

    def tensors(self, name: str, strength: Tensor, dropout: bool) -> functional.Path:
        """What `glora.functional` takes for this path, scaled; None where the path is none."""
        path = self._modules.get(name)
        return None if path is None else path(strength, self.dropout if dropout else 0.0)

    def raw(self, name: str, strength: Tensor, dropout: bool) -> Scaled | None:
        """A path's own tensors and their scale; None where the path is none."""
        path = cast("paths.LowRank | paths.Vector | None", self._modules.get(name))
        return None if path is None else path.raw(strength, self.dropout if dropout else 0.0)

    def reset_parameters(self, weight: Tensor) -> None:
        """Start again, as `config.init` says, for a layer with this frozen weight."""
        for name, path in cast("dict[str, paths.LowRank | paths.Vector]", self._modules).items():
            if weight.is_meta or self.config.init == "identity":
                path.reset_parameters(None)
            else:
                path.reset_parameters(paths.spread(name, self.config.forms[name], weight, self.product))


class Weight(Adapters):
    """Registered on `weight`: `W0 + sum_i w_i (W0 * A_i + B_i)` over the active adapters i."""

    def forward(self, W0: Tensor, dropout: bool = False) -> Tensor:
        """The adapted weight, `(out, in)`, W0's dtype; W0 itself where no adapter acts."""
        updates: list[Tensor | None] = []
        for name, strength in self.active.items():
            part = cast("Paths", self._modules[name])
            A, B = (part.tensors(path, strength, dropout) for path in WEIGHT_PATHS)
            updates.append(functional.weight_update(W0, A, B, product=part.product))
        return functional.add(W0, updates)

    def updates(self, dropout: bool) -> list[Update]:
        """What the active adapters do to the weight, for the short ways of `glora.ways`."""
        parts = [(cast("Paths", self._modules[name]), strength) for name, strength in self.active.items()]
        return [Update(p.raw("A", s, dropout), p.raw("B", s, dropout), p.product) for p, s in parts]


class Bias(Adapters):
    """Registered on `bias`: `b0 + sum_i w_i (b0 * D_i + E_i + W0 C_i)` over the active adapters i.

    Args:
        created: the layer has no bias of its own; this one is there for the paths alone.
    """

    # Note [Bias needs the frozen weight]
    # C multiplies W0, which stands under the other tensor's parametrization. `glora.layer.read` hands it in at each
    # call; a reference kept here would go stale whenever the parameter is replaced (`to_empty`, FSDP, functional_call).
    # Torch's `remove_parametrizations(layer, "weight")` writes W' into the very tensor that held W0. A layer that has a
    # C then keeps W0 here, as a buffer that moves, copies and saves with the model.
    frozen_weight: Tensor | None

    def __init__(self, created: bool = False) -> None:
        super().__init__()
        self.created = created
        self.register_buffer("frozen_weight", None)
        self.last_read: weakref.ref[Tensor] | None = None

    def forward(self, b0: Tensor, W0: Tensor | None = None, dropout: bool = False) -> Tensor:
        """The adapted bias, `(out,)`, b0's dtype; b0 itself where no adapter acts."""
        if W0 is None:
            raise RuntimeError(
                "A bias adapted by glora needs its layer's frozen weight, and was computed without it. Read the `bias` "
                "of the layer that glora.apply adapted; its parametrization cannot be moved to another layer."
            )
        updates: list[Tensor | None] = []
        for name, strength in self.active.items():
            part = cast("Paths", self._modules[name])
            C, D, E = (part.tensors(path, strength, dropout) for path in BIAS_PATHS)
            updates.append(functional.bias_update(W0, b0, C, D, E))
        return functional.add(b0, updates)

    def has_prompt(self) -> bool:
        """Whether any adapter, active or not, has a path C."""
        return any("C" in part._modules for _, part in self.parts())


class HeadCopy(nn.Module):
    """One adapter's own copy of a parameter or buffer."""

    value: Tensor

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        copy = original.detach().clone()
        if isinstance(original, nn.Parameter):
            self.value = nn.Parameter(copy, requires_grad=copy.is_floating_point() or copy.is_complex())
        else:
            self.register_buffer("value", copy)

    @torch.no_grad()
    def reset_parameters(self, original: Tensor) -> None:
        """Start again from the base model's tensor."""
        self.value.copy_(original)


class Head(Adapters):
    """Registered on each tensor of a trainable module: the active adapter's copy, or the base model's tensor."""

    def forward(self, original: Tensor) -> Tensor:
        """The copy itself, not a copy of it: what a module writes into a buffer goes to the adapter that is active."""
        for name in self.active:
            return cast("HeadCopy", self._modules[name]).value
        return original
