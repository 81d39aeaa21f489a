"""A supernet, attached."""

from __future__ import annotations

import warnings

from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora.matrices import has_linear_forward
from glora.model.attach import attach, warn_of
from glora.model.change import change
from glora.model.plan import plan_targets
from glora.model.records import PlannedLayer
from glora.model.targets import Targets, Trainable
from glora.model.walk import Model
from glora.search.entangled import Entangled
from glora.search.space import Space
from glora.text import format_names


def supernet(
    model: Model, targets: Targets, space: Space, *, name: str = "default", trainable: Trainable = (), seed: int = 0
) -> Model:
    """Attach every form of a space to the linear layers of a model at once, in the tensors of the largest.

    The vector form of a path is column 0 of its `left` `(out, r)`, the constant its entry [0, 0], a smaller rank the
    first columns of `left` and rows of `right` `(r, in)` (Note [Entangled]). In training every layer draws its forms
    anew in each forward, all equally likely; in eval nothing is drawn, and the largest forms act. `choose` sets
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

    def build(layer: PlannedLayer, names: tuple[str, ...], weight: Tensor) -> Entangled:
        return Entangled(layer.path, name, space, seed, names, weight)

    with change(model) as walk:
        planned = plan_targets(walk, targets, space.largest, trainable=trainable, name=name)
        warn_of(planned)
        not_sampled = [layer.path for layer in planned.layers if not _is_sampled(layer.module)]
        if not_sampled:
            warnings.warn(
                f"Forms are drawn in nn.Linear's own forward; {len(not_sampled)} layers are never called, or have "
                f"another forward ({format_names(not_sampled)}). They draw nothing and train their largest forms, "
                f"unless others are chosen. Leave them out of targets=.",
                UserWarning,
                stacklevel=2,
            )
        attach(walk, planned, build=build)
    return model


def _is_sampled(module: nn.Module) -> bool:
    """Whether the layer runs nn.Linear's own forward, which draws."""
    is_called = not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return (
        is_called
        and "forward" not in vars(module)
        and has_linear_forward(parametrize.type_before_parametrizations(module))
    )
