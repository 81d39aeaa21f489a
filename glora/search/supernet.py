"""A supernet: attached once, switched to any choice of forms."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora.config import GLoRAConfig
from glora.matrices import has_linear_forward
from glora.model.attach import attach, warn_of
from glora.model.checks import refuse_while_swapped
from glora.model.modules import Model
from glora.model.plan import plan
from glora.model.planned import PlannedLayer
from glora.model.targets import Targets, Trainable
from glora.search.entangled import Entangled
from glora.search.space import Space
from glora.text import format_names, format_problems


def supernet(
    model: Model, targets: Targets, space: Space, *, name: str = "default", trainable: Trainable = (), seed: int = 0
) -> Model:
    """Attach every form of a space to the linear layers of a model at once, in the tensors of the largest.

    The vector form of a path is column 0 of its `left` `(out, r)`, the constant its entry [0, 0], a smaller rank the
    first columns of `left` and rows of `right` `(r, in)` (Note [Entangled]). In training every layer draws its forms
    anew in each forward, each form equally often; in eval nothing is drawn, and the largest forms act. `choose` sets
    the forms, for both. `layer.weight`, `glora.merge` and all else that reads tensors has the chosen forms, or the
    largest.

    Train it as any adapter, uncompiled. `glora.save` writes the largest; `extract` a choice first to save that one.

    Args:
        model: the model.
        targets: which layers, as for `glora.apply`; no mapping.
        space: the forms that each may choose from. Layers without a bias have A and B alone.
        name: the adapter's name.
        trainable: modules that train whole beside it, as for `glora.apply`.
        seed: of the draws; factors start from torch's global generator.

    Returns:
        The model, with the supernet its only active adapter and the rest frozen.

    Raises:
        ValueError: as `glora.apply`.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Warns:
        UserWarning: as `glora.apply`; and layers in which nothing is drawn, since their forward is their own: they
            train their largest forms alone.

    Source: GLoRA, arXiv 2306.07967, section 3.3.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> space = glora.search.Space(A=["vector", "none"], C=["none"], ranks=[1, 2])
        >>> model = glora.search.supernet(model, ["0"], space)
        >>> _ = glora.search.choose(model, {"0": glora.GLoRAConfig.lora(rank=1)})
        >>> glora.merge(model)[0]
        Linear(in_features=4, out_features=8, bias=True)
    """
    if not isinstance(space, Space):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"space= must be a glora.search.Space; found {space!r}.")
    planned = plan(model, targets, space.largest, trainable=trainable, name=name)
    warn_of(planned)
    undrawn = [layer.path for layer in planned.layers if not _is_drawn(layer.module)]
    if undrawn:
        warnings.warn(
            f"Forms are drawn in nn.Linear's own forward, and {len(undrawn)} layers have another, or are never called "
            f"({format_names(undrawn)}). Nothing is drawn there: they train the largest forms, unless others are "
            f"chosen. Leave them out of targets=.",
            UserWarning,
            stacklevel=2,
        )

    def build(layer: PlannedLayer, names: tuple[str, ...], weight: Tensor) -> Entangled:
        return Entangled(layer.path, name, space, seed, layer.config, names, weight)

    return attach(model, planned, build=build)


def _is_drawn(module: nn.Module) -> bool:
    never_called = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    own = not has_linear_forward(parametrize.type_before_parametrizations(module)) or "forward" in vars(module)
    return not never_called and not own


@dataclass(frozen=True)
class Layer:
    """A layer of a supernet: its parts, on the weight and on the bias, and what they may choose from together."""

    parts: tuple[Entangled, ...]

    @functools.cached_property
    def space(self) -> Space:
        """The supernet's, less the paths that the layer does not have."""
        return self.parts[0].whole_space.only(*[path for part in self.parts for path in part.paths()])

    @functools.cached_property
    def costs(self) -> dict[tuple[str, str, int], int]:
        """Path, form and rank to how many numbers it has."""
        return {
            (path, form, rank): sum(part.count(path, form, rank) for part in self.parts)
            for path, forms in self.space.forms.items()
            for form in forms
            for rank in self.space.ranks
        }

    def count(self, config: GLoRAConfig) -> int:
        """How many numbers a choice has."""
        rank = config.rank if "lora" in config.forms.values() else self.space.ranks[0]
        return sum(self.costs[path, form, rank] for path, form in config.forms.items())

    def set(self, config: GLoRAConfig | None) -> None:
        """Let a choice act; None for the draws and the largest."""
        for part in self.parts:
            part.chosen = config


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Path to layer of the model's supernet.

    Raises:
        ValueError: there is none, or there are several.
        RuntimeError: inside `glora.merged` or `glora.route`.
    """
    refuse_while_swapped(model)
    parts = [module for module in model.modules() if isinstance(module, Entangled)]
    if len({part.adapter for part in parts}) != 1:
        raise ValueError(
            f"The model must have one supernet; found {format_names({part.adapter for part in parts}) or 'none'}. "
            f"glora.search.supernet attaches one, glora.delete drops one."
        )
    grouped: dict[str, list[Entangled]] = {}
    for part in parts:
        grouped.setdefault(part.owner, []).append(part)
    return {path: Layer(tuple(group)) for path, group in grouped.items()}


def spaces(model: nn.Module) -> dict[str, Space]:
    """Path of each layer of the supernet to what it may choose from.

    Example:
        >>> import torch, glora
        >>> layer = glora.search.supernet(torch.nn.Linear(4, 2), "all-linear", glora.search.Space(ranks=[1, 2]))
        >>> glora.search.spaces(layer)[""].largest.rank
        2
    """
    return {path: layer.space for path, layer in layers_of(model).items()}


def choose(model: Model, targets: Mapping[str, GLoRAConfig] | None) -> Model:
    """Switch a supernet to a choice of forms, in training and in eval; nothing is copied.

    Args:
        model: the model.
        targets: path of a layer to its forms; a layer that is not named has none. None for no choice: draws in
            training, the largest forms in eval.

    Returns:
        The model. This changes it for every thread.

    Raises:
        ValueError: no supernet, or several; a path that is not one of its layers; forms that are not in its space.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Example:
        >>> import torch, glora
        >>> layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
        >>> model = glora.search.supernet(layer, "all-linear", glora.search.Space())
        >>> torch.equal(glora.search.choose(model, {})(x), glora.search.choose(model, None).eval()(x))
        True
    """
    layers = layers_of(model)
    configs = {} if targets is None else checked(layers, targets)
    for path, layer in layers.items():
        layer.set(configs.get(path))
    return model


def checked(layers: Mapping[str, Layer], targets: Mapping[str, GLoRAConfig]) -> dict[str, GLoRAConfig]:
    """The config of every layer for a choice; ValueError where the supernet has no such choice."""
    problems = [f"{path!r} is no layer of it" for path in targets if path not in layers]
    configs: dict[str, GLoRAConfig] = {}
    for path, layer in layers.items():
        config = configs[path] = targets.get(path, layer.space.config({}, 1))
        if not isinstance(config, GLoRAConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            problems.append(f"{path!r}: {config!r}, no GLoRAConfig")
        elif misfit := layer.space.misfit(config):
            problems.append(f"{path!r}: {misfit}")
    if problems:
        raise ValueError(
            f"A choice must lie in the supernet's space, and nothing was changed; found {format_problems(problems)}. "
            f"glora.search.spaces(model) says what each layer may choose from."
        )
    return configs
