"""What is compared: each method attaches itself to a classifier and says what trains, at which learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import glora
from benchmarks.accuracy.model import Classifier, Group
from benchmarks.peers import peft_model

Attach = Callable[[Classifier], list[Group]]
# A parameter's key (`layer.0.query.A.left`) and rms(W0) of its layer to its learning rate, as a multiple of the run's.
Factor = Callable[[str, float], float]


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        attach: freezes, attaches, and returns what trains besides the head.
        budget: the column of budgets that it belongs to, as a share of the model's parameters; "" for none.
    """

    attach: Attach
    budget: str = ""


def _full(model: Classifier) -> list[Group]:
    return [Group(list(model.encoder.parameters()))]


def _glora(config: glora.GLoRAConfig, targets: list[str] | None = None, factor: Factor | None = None) -> Attach:
    def attach(model: Classifier) -> list[Group]:
        sizes = {path: module.weight.square().mean().sqrt().item() for path, module in _layers(model)}
        glora.apply(model.encoder, targets or model.targets, config)
        named = dict(glora.named_parameters(model.encoder))
        if factor is None:
            return [Group(list(named.values()))]
        return [Group([p], factor(key, sizes[key.rsplit(".", 2)[0]])) for key, p in named.items()]

    return attach


def _layers(model: Classifier) -> list[tuple[str, Any]]:
    ends = tuple(f".{target}" for target in model.targets)
    return [(path, module) for path, module in model.encoder.named_modules() if f".{path}".endswith(ends)]


def _peft(config: str, rank: int) -> Attach:
    def attach(model: Classifier) -> list[Group]:
        model.encoder = peft_model(model.encoder, config, rank, target_modules=model.targets)
        return [Group([p for p in model.encoder.parameters() if p.requires_grad])]

    return attach


_C = glora.GLoRAConfig
_ATTENTION = ["query", "value"]  # as the model of texts calls them
_CONSTANTS: dict[str, Any] = {"A": "constant", "B": "constant", "C": "none", "D": "constant", "E": "vector"}
_VECTORS: dict[str, Any] = {"A": "vector", "B": "vector"}

# The model of texts has 22.7 million parameters: the budgets are about 11, 45, 115 and 340 thousand, and a rank-1 B on
# all of its 36 layers has 41,472. The model of images has 72 layers, and there each method has twice as many numbers.
METHODS: dict[str, Method] = {
    "LoRA r8": Method(_glora(_C.lora(rank=8)), "1.5%"),
    "GLoRA r3": Method(_glora(_C(rank=3)), "1.5%"),
    "GLoRA A vector r6": Method(_glora(_C(A="vector", rank=6)), "1.5%"),
    "LoRA r1": Method(_glora(_C.lora(rank=1)), "0.2%"),
    "IA3": Method(_glora(_C.ia3()), "0.2%"),
    "SSF": Method(_glora(_C.ssf()), "0.2%"),
    "BitFit": Method(_glora(_C.bitfit()), "0.05%"),
    "full": Method(_full),
    "HiRA r8": Method(_glora(_C.hira(rank=8)), "1.5%"),
    "GLoRA r1": Method(_glora(_C(rank=1)), "0.5%"),
    "GLoRA A vector r1": Method(_glora(_C(A="vector", rank=1)), "0.5%"),
    "LoRA r3": Method(_glora(_C.lora(rank=3)), "0.5%"),
    "GLoRA vectors": Method(_glora(_C(**_VECTORS)), "0.5%"),
    "GLoRA constants": Method(_glora(_C(**_CONSTANTS)), "0.05%"),
    "LoRA r1, query and value": Method(_glora(_C.lora(rank=1), _ATTENTION), "0.05%"),
    "PEFT GLoRA r3": Method(_peft("GloraConfig", 3), "1.5%"),
    "PEFT LoRA r8": Method(_peft("LoraConfig", 8), "1.5%"),
    "RepAdapter r7": Method(_glora(_C.repadapter(rank=7)), "1.5%"),
}


def _left_of_a(size: Callable[[float], float]) -> Factor:
    return lambda key, rms: size(rms) if key.endswith(".A.left") else 1.0


# Note [Scale by learning rate]
# AdamW does not see the size of a gradient. So `s * (left @ right)` with left = 0 at the start trains as `left @ right`
# does whose left has s times the learning rate (but for weight decay). The variants with a factor for A's left are thus
# also the runs of an A that is scaled by s, one number a layer.

# What is tried to see why: GLoRA r3 with one thing changed each, and a LoRA to go with it.
VARIANTS: dict[str, Method] = {
    "GLoRA r3, A / rms(W0)": Method(_glora(_C(rank=3), factor=_left_of_a(lambda rms: 1 / rms))),
    "GLoRA r3, A's left x 4": Method(_glora(_C(rank=3), factor=_left_of_a(lambda _: 4.0))),
    "GLoRA r3, lr x 2": Method(_glora(_C(rank=3), factor=lambda _key, _rms: 2.0)),
    "LoRA r8, lr x 2": Method(_glora(_C.lora(rank=8), factor=lambda _key, _rms: 2.0)),
    **{f"GLoRA r3 without {path}": Method(_glora(_C(**{path: "none"}, rank=3))) for path in "ABCDE"},
}
