"""A supernet: attached, and turned into an ordinary adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from glora.config import GLoRAConfig
from glora.engines.fsdp import is_fully_sharded
from glora.layer.parametrization import stores_of
from glora.layer.registration import unregister
from glora.model.adapters import set_acting
from glora.model.attach import attach, warn_of
from glora.model.change import change
from glora.model.checks import has_known_forward
from glora.model.plan import plan_targets
from glora.model.records import PlannedLayer
from glora.model.targets import Targets, Trainable
from glora.model.walk import Model
from glora.search.choices import complete, layers_of
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
        not_sampled = [layer.path for layer in planned.layers if not has_known_forward(layer.module)]
        if not_sampled:
            warnings.warn(
                f"Forms are drawn in the forward of nn.Linear and nn.Embedding; {len(not_sampled)} layers are never "
                f"called, or have another forward ({format_names(not_sampled)}). They draw nothing and train their "
                f"largest forms, unless others are chosen. Leave them out of targets=.",
                UserWarning,
                stacklevel=2,
            )
        attach(walk, planned, build=build)
    return model


def extract(model: Model, targets: Mapping[str, GLoRAConfig]) -> Model:
    """Turn a supernet into an ordinary adapter of a choice's forms alone, with the weights that it inherits.

    The outputs are those of the supernet with this choice. It is then the adapter that `glora.apply(model, targets)`
    attaches: it merges, saves and trains as such. Heads stay as they are.

    Args:
        model: the model.
        targets: path of a layer to its forms; a layer that is left out loses the adapter.

    Returns:
        The model. Its parameters are new tensors: make the optimizer after this.

    Raises:
        ValueError: as `choose`; a choice without any path.
        RuntimeError: inside `glora.merged` or `glora.route`; another parametrization beside or on top of the supernet;
            a model under `fully_shard`.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = glora.search.supernet(model, "all-linear", glora.search.Space(ranks=[1, 2]))
        >>> model = glora.search.extract(model, {"2": glora.GLoRAConfig.lora(rank=1)})
        >>> list(glora.state_dict(model))
        ['2.B.left', '2.B.right']
    """
    configs = complete(layers_of(model), targets)
    if any(is_fully_sharded(module) for module in model.modules()):
        raise RuntimeError(
            "fully_shard takes no new parameters, and an extracted adapter has new ones; found a model that it has "
            "sharded. Extract first, or bring the supernet's glora.state_dict into a model with the same supernet that "
            "is not sharded, with glora.load_state_dict, and extract there."
        )
    if not any(config.paths for config in configs.values()):
        raise ValueError("A choice must have a path to be an adapter; every path of this one is none in every layer.")
    with change(model, taking_off=True) as walk:
        for owner in walk:
            for tensor_name, store in owner.stores.items():
                for name, part in list(store.parts().items()):
                    if isinstance(part, Entangled):
                        paths = part.extracted(configs[part.owner])
                        if paths is None:
                            store.detach(name)
                        else:
                            store.parts()[name] = paths
                if not store.parts():
                    unregister(owner.module, tensor_name, keep_value=False)
            if stores_of(owner.module):
                set_acting(owner, owner.acting.adapter_weights)
    return model
