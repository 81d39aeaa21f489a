"""A choice: one config for each layer of a supernet."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from glora.config import GLoRAConfig
from glora.model.change import refuse_while_swapped
from glora.model.walk import Model
from glora.search.entangled import Entangled
from glora.search.space import Space
from glora.text import format_names, format_problems


@dataclass(frozen=True)
class Layer:
    """A layer of a supernet.

    Attributes:
        parts: its entangled paths, on the weight and on the bias.
    """

    parts: tuple[Entangled, ...]

    @functools.cached_property
    def space(self) -> Space:
        """The supernet's space, less the paths that the layer does not have."""
        return self.parts[0].full_space.only(*[path for part in self.parts for path in part.paths()])

    def count(self, config: GLoRAConfig) -> int:
        """How many parameters a config has."""
        return sum([math.prod(shape) for part in self.parts for shape in part.shapes(config).values()])


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Path to layer of the model's supernet.

    Raises:
        ValueError: there is none, or there are several.
        RuntimeError: inside `glora.merged` or `glora.route`.
    """
    refuse_while_swapped(model)
    parts = [module for module in model.modules() if isinstance(module, Entangled)]
    names = {part.adapter for part in parts}
    if len(names) != 1:
        raise ValueError(
            f"The model must have one supernet; found {format_names(names) or 'none'}. glora.search.supernet attaches "
            f"one, glora.delete drops one."
        )
    grouped: dict[str, list[Entangled]] = {}
    for part in parts:
        grouped.setdefault(part.owner, []).append(part)
    return {path: Layer(tuple(group)) for path, group in grouped.items()}


def spaces(model: nn.Module) -> dict[str, Space]:
    """Path of each layer of the supernet to the space that it may choose from.

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
        targets: path of a layer to its forms; a layer that is left out has none. None for no choice: draws in
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
    switch(layers, {} if targets is None else complete(layers, targets))
    return model


def switch(layers: Mapping[str, Layer], configs: Mapping[str, GLoRAConfig | None]) -> None:
    """Switch each layer to its config; one without a config draws in training and has its largest forms in eval."""
    for path, layer in layers.items():
        for part in layer.parts:
            part.chosen = configs.get(path)


def complete(layers: Mapping[str, Layer], targets: Mapping[str, GLoRAConfig]) -> dict[str, GLoRAConfig]:
    """The config of every layer in a choice; ValueError where the choice is not in the supernet's space."""
    problems = [f"{path!r} is no layer of it" for path in targets if path not in layers]
    configs = {path: targets.get(path, layer.space.config({}, 1)) for path, layer in layers.items()}
    for path, config in configs.items():
        if not isinstance(config, GLoRAConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            problems.append(f"{path!r}: {config!r}, no GLoRAConfig")
        elif reason := layers[path].space.why_not(config):
            problems.append(f"{path!r}: {reason}")
    if problems:
        raise ValueError(
            f"A choice must lie in the supernet's space, and nothing was changed; found {format_problems(problems)}. "
            f"glora.search.spaces(model) says what each layer may choose from."
        )
    return configs
