"""From a supernet to an ordinary adapter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from glora.config import GLoRAConfig
from glora.layer.registration import unregister
from glora.model.adapters import set_acting
from glora.model.change import change
from glora.model.walk import Model
from glora.search.entangled import Entangled
from glora.search.supernet import checked, layers_of


def extract(model: Model, targets: Mapping[str, GLoRAConfig]) -> Model:
    """Turn a supernet into an ordinary adapter of a choice's forms alone, with the weights that it inherits.

    The outputs are those of the supernet with this choice. What is left is what `glora.apply(model, targets)` attaches:
    it merges, saves and trains as such. Heads stay as they are.

    Args:
        model: the model.
        targets: path of a layer to its forms; a layer that is not named loses the adapter.

    Returns:
        The model. Its parameters are new tensors: make the optimizer after this.

    Raises:
        ValueError: as `choose`; a choice without any path.
        RuntimeError: inside `glora.merged` or `glora.route`; another parametrization beside or on top of the supernet.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = glora.search.supernet(model, "all-linear", glora.search.Space(ranks=[1, 2]))
        >>> model = glora.search.extract(model, {"2": glora.GLoRAConfig.lora(rank=1)})
        >>> list(glora.state_dict(model))
        ['2.B.left', '2.B.right']
    """
    layers = layers_of(model)
    configs = checked(layers, targets)
    if not any(config.paths for config in configs.values()):
        raise ValueError("A choice must have a path to be an adapter; every path of this one is none in every layer.")
    with change(model, taking_off=True) as walk:
        made: dict[nn.Module, nn.Module | None] = {
            part: part.extracted(configs[path]) for path, layer in layers.items() for part in layer.parts
        }
        for owner in walk:
            for tensor_name, store in owner.stores.items():
                for name, part in [(n, p) for n, p in store.parts().items() if isinstance(p, Entangled)]:
                    plain = made[part]
                    if plain is None:
                        store.detach(name)
                    else:
                        store.parts()[name] = plain
                if not store.parts():
                    unregister(owner.module, tensor_name, keep_value=False)
            if owner.stores:
                set_acting(owner, owner.acting.adapter_weights)
    return model
