"""From a supernet to an ordinary adapter."""

from __future__ import annotations

from collections.abc import Mapping

from glora.config import GLoRAConfig
from glora.engines.fsdp import is_fully_sharded
from glora.layer.parametrization import stores_of
from glora.layer.registration import unregister
from glora.model.adapters import set_acting
from glora.model.change import change
from glora.model.walk import Model
from glora.search.choices import complete, layers_of
from glora.search.entangled import Entangled


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
