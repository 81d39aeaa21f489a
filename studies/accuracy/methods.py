"""What is compared: each method attaches itself to a classifier and says what trains, at which learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import glora
from glora.layer.factors import LowRank
from studies.accuracy.model import Classifier, Group

Attach = Callable[[Classifier], list[Group]]


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


def _glora(config: glora.GLoRAConfig, balance: bool = False, right: bool = False, plus: float = 1.0) -> Attach:
    def attach(model: Classifier) -> list[Group]:
        glora.apply(model.encoder, model.targets, config)
        for module in model.encoder.modules():
            if not hasattr(module, "parametrizations") or "weight" not in module.parametrizations: continue
            A = module.parametrizations.weight[0].default.paths().get("A")
            if isinstance(A, LowRank):
                rms = module.parametrizations.weight.original.square().mean().sqrt().item()
                if balance:
                    vars(A).update(scaling=1 / rms)
                if right:
                    A.right.data.mul_(1 / rms)
        named = dict(glora.named_parameters(model.encoder))
        return [Group([p], plus if key.endswith("B.left") else 1.0) for key, p in named.items()]
    return attach


_C = glora.GLoRAConfig
_NONE: dict[str, Any] = dict.fromkeys("CDE", "none")

METHODS: dict[str, Method] = {
    "LoRA r8": Method(_glora(_C.lora(rank=8)), "1.5%"),
    "A r8": Method(_glora(_C.hira(rank=8), True), "1.5%"),
    "A + B r4": Method(_glora(_C(rank=4, **_NONE), True), "1.5%"),
    "all paths r3": Method(_glora(_C(rank=3), True), "1.5%"),
    "A vector, B r8": Method(_glora(_C(A="vector", rank=8, **_NONE)), "1.5%"),
    "all paths r3, not balanced": Method(_glora(_C(rank=3)), "1.5%"),
    "A + B r4, larger right": Method(_glora(_C(rank=4, **_NONE), False, True), "1.5%"),
    "A r8, larger right": Method(_glora(_C.hira(rank=8), False, True), "1.5%"),
    "LoRA+ r8": Method(_glora(_C.lora(rank=8), plus=4.0), "1.5%"),
    "A r8, not balanced": Method(_glora(_C.hira(rank=8)), "1.5%"),
    "LoRA r2": Method(_glora(_C.lora(rank=2)), "0.4%"),
    "A r2": Method(_glora(_C.hira(rank=2), True), "0.4%"),
    "A + B r1": Method(_glora(_C(rank=1, **_NONE), True), "0.4%"),
    "full": Method(_full),
}
