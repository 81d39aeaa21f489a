"""What is compared: each method attaches itself to a classifier and says what trains, at which learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import glora
from studies.accuracy.model import Classifier, Group

Method = Callable[[Classifier], list[Group]]


def _full(model: Classifier) -> list[Group]:
    return [Group(list(model.encoder.parameters()))]


def _glora(config: glora.GLoRAConfig) -> Method:
    def attach(model: Classifier) -> list[Group]:
        glora.apply(model.encoder, model.targets, config)
        return [Group(list(glora.parameters(model.encoder)))]

    return attach


def _larger_right(config: glora.GLoRAConfig) -> Method:
    """A start of A's `right` that is larger by what a balance would be, in place of one."""

    def attach(model: Classifier) -> list[Group]:
        glora.apply(model.encoder, model.targets, config)
        balanced = {key: value for key, value in glora.state_dict(model.encoder).items() if key.endswith("A.balance")}
        named = dict(glora.named_parameters(model.encoder))
        with torch.no_grad():
            for key, balance in balanced.items():
                named[key.replace("A.balance", "A.right")].mul_(balance)
                balance.fill_(1.0)
        return [Group(list(named.values()))]

    return attach


def _plus(config: glora.GLoRAConfig, ratio: float) -> Method:
    """LoRA+ (arXiv 2402.12354): B's left at a multiple of the rate of the rest."""

    def attach(model: Classifier) -> list[Group]:
        glora.apply(model.encoder, model.targets, config)
        named = dict(glora.named_parameters(model.encoder))
        return [Group([p], ratio if key.endswith("B.left") else 1.0) for key, p in named.items()]

    return attach


_C = glora.GLoRAConfig
_NONE: dict[str, Any] = dict.fromkeys("CDE", "none")

# The model of texts has 22.7 million parameters; rank 8 of one path on its 36 layers has 331,776 numbers, 1.5%.
METHODS: dict[str, Method] = {
    "LoRA r8": _glora(_C.lora(rank=8)),
    "A r8": _glora(_C.hira(rank=8)),
    "A + B r4": _glora(_C(rank=4, A="lora", B="lora", **_NONE)),
    "all paths r3": _glora(_C(rank=3, A="lora", B="lora", C="vector", D="vector", E="vector")),
    "A vector, B r8": _glora(_C(rank=8, A="vector", B="lora", **_NONE)),
    "all paths r3, not balanced": _glora(
        _C(rank=3, A="lora", B="lora", C="vector", D="vector", E="vector", balance="none")
    ),
    "A r8, larger right": _larger_right(_C.hira(rank=8)),
    "A r8, not balanced": _glora(_C.hira(rank=8, balance="none")),
    "LoRA+ r8": _plus(_C.lora(rank=8), 4.0),
    "LoRA r2": _glora(_C.lora(rank=2)),
    "A r2": _glora(_C.hira(rank=2)),
    "full fine-tuning": _full,
}
