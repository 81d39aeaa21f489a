"""What an adapter is made of: one form for each path, the rank, and how it starts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, TypeAlias

WeightForm: TypeAlias = Literal["lora", "vector", "constant", "none"]
PromptForm: TypeAlias = Literal["lora", "vector", "none"]
BiasForm: TypeAlias = Literal["vector", "constant", "none"]
Product: TypeAlias = Literal["hadamard", "matmul"]
Init: TypeAlias = Literal["identity", "random"]
Balance: TypeAlias = Literal["rms", "none"]

# The forms that each path may take, from the most expressive to nothing.
FORMS: dict[str, tuple[str, ...]] = {
    "A": ("lora", "vector", "constant", "none"),
    "B": ("lora", "vector", "constant", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "constant", "none"),
    "E": ("vector", "constant", "none"),
}
# What other libraries call it.
_ELSEWHERE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets= of glora.apply",
    "modules_to_save": "trainable= of glora.apply",
}
WEIGHT_PATHS = ("A", "B")
BIAS_PATHS = ("C", "D", "E")


@dataclass(frozen=True, kw_only=True)
class GLoRAConfig:
    r"""The forms of the five paths of $W' = W_0 + W_0 \ast A + B$, $b' = b_0 + b_0 \odot D + E + W_0 C$.

    The default is LoRA, since in the studies nothing of equal size was more accurate, and nothing is cheaper. Each path
    chooses its form on its own. `"lora"` is a product of two thin factors, `"vector"` one number a channel,
    `"constant"` one number, `"none"` nothing at all.

    Args:
        A: scales the weight: lora, vector, constant or none.
        B: shifts the weight: lora, vector, constant or none.
        C: prompt, a constant added to the layer's input: lora, vector or none. A low-rank C spans no more than a
            vector and costs `rank` times as much; it is there for files from elsewhere.
        D: scales the bias: vector, constant or none.
        E: shifts the bias: vector, constant or none.
        rank: width r of every lora factor, at least 1.
        alpha: `left @ right` is multiplied by `alpha / rank`; None means `alpha = rank`, a factor of 1.
        balance: `"rms"` multiplies a low-rank A by a number of each layer that does not train, 1 / rms(W0) (of a matrix
            product 1 / (sqrt(in_features) rms(W0))), so that one learning rate serves A and B alike (Note [Balance]);
            `"none"` does not. Without a low-rank A they are the same.
        product: how A meets the weight: `"hadamard"` (elementwise: the authors' code, PEFT) or `"matmul"` (`W0 @ A`:
            the paper's figure, LyCORIS).
        init: `"identity"` starts as the base model (left = 0, right Kaiming-uniform with a = sqrt(5), the rest 0);
            `"random"` draws every factor so that each path changes the weight (or bias) by about a tenth of W0's norm
            (D: of b0's).
        rank_dropout: probability in [0, 1) with which each of the r components of a lora path is dropped in a training
            step; the kept ones are scaled by 1 / (1 - rank_dropout). It acts in the layer's forward alone.
        create_bias: give a layer without a bias one (zeros, frozen) for C and E to act on.

    Raises:
        ValueError: a value that is not allowed, with those that are.

    Source: GLoRA, arXiv 2306.07967, section 3.2; the presets name theirs.

    Example:
        >>> import glora
        >>> glora.GLoRAConfig(A="vector", rank=4).forms
        {'A': 'vector', 'B': 'lora', 'C': 'none', 'D': 'none', 'E': 'none'}
        >>> glora.GLoRAConfig.glora(rank=16, C="none").forms
        {'A': 'lora', 'B': 'lora', 'C': 'none', 'D': 'vector', 'E': 'vector'}
    """

    def __new__(cls, *values: object, **options: object) -> GLoRAConfig:
        """The config; a TypeError names the field that an unknown option comes closest to."""
        if values:
            raise TypeError(f"GLoRAConfig takes its options by name; found {values!r}. Pass rank=8, B='lora', say.")
        for option in options.keys() - cls.__dataclass_fields__.keys():
            near = _ELSEWHERE.get(option) or "".join(get_close_matches(option, cls.__dataclass_fields__, 1))
            hint = f" (did you mean {near}?)" if near else ""
            raise TypeError(f"GLoRAConfig has no {option!r}{hint}; it has {', '.join(cls.__dataclass_fields__)}.")
        return super().__new__(cls)

    A: WeightForm = "none"
    B: WeightForm = "lora"
    C: PromptForm = "none"
    D: BiasForm = "none"
    E: BiasForm = "none"
    rank: int = 8
    alpha: float | None = None
    balance: Balance = "rms"
    product: Product = "hadamard"
    init: Init = "identity"
    rank_dropout: float = 0.0
    create_bias: bool = False

    def __post_init__(self) -> None:
        for path, allowed in FORMS.items():
            _one_of(path, getattr(self, path), allowed)
        _one_of("product", self.product, ("hadamard", "matmul"))
        _one_of("init", self.init, ("identity", "random"))
        _one_of("balance", self.balance, ("rms", "none"))
        if type(self.rank) is not int or not 1 <= self.rank < 2**63:
            raise ValueError(
                f"rank must be an int of at least 1; found {self.rank!r}. A path that is to be left out has the form "
                f"'none'."
            )
        if self.alpha is not None and not (_is_number(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"alpha must be a positive number that a float can hold, or None for alpha = rank; found "
                f"{self.alpha!r:.40}."
            )
        if not (_is_number(self.rank_dropout) and 0 <= self.rank_dropout < 1):
            raise ValueError(f"rank_dropout must be a probability in [0, 1); found {self.rank_dropout!r}.")
        if type(self.create_bias) is not bool:
            raise ValueError(f"create_bias must be True or False; found {self.create_bias!r}.")

    @property
    def forms(self) -> dict[str, str]:
        """Path to form, A to E, `"none"` included."""
        return {path: getattr(self, path) for path in FORMS}

    @property
    def scaling(self) -> float:
        """The factor of `left @ right`: alpha / rank, 1 where alpha is None."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The paths that are not `"none"`, A to E."""
        return tuple([path for path in FORMS if getattr(self, path) != "none"])

    @property
    def is_balanced(self) -> bool:
        """Whether A has a balance (Note [Balance])."""
        return self.A == "lora" and self.balance == "rms"

    def shapes(
        self, out_features: int, in_features: int, paths: Iterable[str] | None = None, batch: tuple[int, ...] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Key to shape of each tensor of these paths, or of all, on a layer of this size.

        This is the one place that says which tensors a form has. With a `batch` (experts), each matrix has its own.

        Example:
            >>> import glora
            >>> glora.GLoRAConfig(E="vector", rank=2).shapes(out_features=3, in_features=5)
            {'B.left': (3, 2), 'B.right': (2, 5), 'E.value': (3,)}
        """
        o, i, r = out_features, in_features, self.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.paths if paths is None else paths:
            form, scales_inputs = getattr(self, path), path == "A" and self.product == "matmul"
            if form == "lora":
                rows, columns = (i, 1) if path == "C" else (i, i) if scales_inputs else (o, i)
                shapes[f"{path}.left"], shapes[f"{path}.right"] = (rows, r), (r, columns)
                if path == "A" and self.is_balanced:
                    shapes["A.balance"] = (1, 1) if batch else (1,)
            elif form == "constant":
                shapes[f"{path}.value"] = (1, 1) if batch and path in "AB" else (1,)
            elif form == "vector":
                channels = (o,) if path in "DE" else (i, 1) if path == "C" else (1, i) if scales_inputs else (o, 1)
                shapes[f"{path}.value"] = channels
        return {key: (*batch, *shape) for key, shape in shapes.items()}

    @classmethod
    def glora(cls, **options: Any) -> GLoRAConfig:
        """GLoRA (arXiv 2306.07967) with all five paths: A, B low rank; C, D, E vectors; `options` may change them.

        Example:
            >>> import glora
            >>> glora.GLoRAConfig.glora(rank=4, A="vector").A
            'vector'
        """
        return cls(**_ALL_PATHS | options)

    @classmethod
    def lora(cls, **options: Any) -> GLoRAConfig:
        """LoRA (arXiv 2106.09685): B low rank. `options` are the other fields of GLoRAConfig, here as in all presets.

        Example:
            >>> import glora
            >>> glora.GLoRAConfig.lora(rank=4).B
            'lora'
        """
        return cls(**_NOTHING | {"B": "lora"}, **options)

    @classmethod
    def hira(cls, **options: Any) -> GLoRAConfig:
        """HiRA (ICLR 2025): A low rank, elementwise product: an update of full rank from two thin factors."""
        return cls(**_NOTHING | {"A": "lora"}, product="hadamard", **options)

    @classmethod
    def ssf(cls, **options: Any) -> GLoRAConfig:
        """SSF (arXiv 2210.08823): scale and shift each output channel: A, D and E vectors."""
        return cls(**_NOTHING | {"A": "vector", "D": "vector", "E": "vector"}, **options)

    @classmethod
    def bitfit(cls, **options: Any) -> GLoRAConfig:
        """BitFit (arXiv 2106.10199): the bias alone: E vector."""
        return cls(**_NOTHING | {"E": "vector"}, **options)

    @classmethod
    def prompt(cls, **options: Any) -> GLoRAConfig:
        """A prompt like VPT's (arXiv 2203.12119): a constant added to the layer's input: C vector."""
        return cls(**_NOTHING | {"C": "vector"}, **options)

    @classmethod
    def repadapter(cls, **options: Any) -> GLoRAConfig:
        """RepAdapter (arXiv 2302.08106): low rank in front of the layer: A low rank, matrix product, C vector."""
        return cls(**_NOTHING | {"A": "lora", "C": "vector"}, product="matmul", **options)

    @classmethod
    def ia3(cls, **options: Any) -> GLoRAConfig:
        """IA3's scaling of a layer's output (arXiv 2205.05638): A and D vectors."""
        return cls(**_NOTHING | {"A": "vector", "D": "vector"}, **options)


_NOTHING: dict[str, Any] = dict.fromkeys(FORMS, "none")
_ALL_PATHS: dict[str, Any] = {"A": "lora", "B": "lora", "C": "vector", "D": "vector", "E": "vector"}


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}; found {value!r}.")


def _is_number(value: object) -> bool:
    """Whether it is a finite number, no larger than a float can be."""
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest
