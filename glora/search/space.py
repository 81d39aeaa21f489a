"""Which forms a layer may choose from."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glora.config import FORMS, GLoRAConfig, Product


@dataclass(frozen=True, kw_only=True)
class Space:
    """The forms that each path of a layer may take, and the ranks of its low-rank paths.

    Args:
        A: forms of A, by default all of GLoRAConfig's; so B, C, D and E.
        B: forms of B.
        C: forms of C.
        D: forms of D.
        E: forms of E.
        ranks: of all low-rank paths of a layer, one for the layer.
        alpha: as GLoRAConfig's: at rank r, `left @ right` is multiplied by `alpha / r`; by 1 at every rank if None.
        product: as GLoRAConfig's.

    Raises:
        ValueError: a form, rank, alpha or product that GLoRAConfig does not take, or none at all.

    Example:
        >>> space = Space(A=["none"], C=["vector", "none"], ranks=[4, 2])
        >>> space.largest
        GLoRAConfig(A='none', B='lora', C='vector', D='vector', E='vector', rank=4, ...)
    """

    A: Sequence[str] = FORMS["A"]
    B: Sequence[str] = FORMS["B"]
    C: Sequence[str] = FORMS["C"]
    D: Sequence[str] = FORMS["D"]
    E: Sequence[str] = FORMS["E"]
    ranks: Sequence[int] = (2, 4, 8)
    alpha: float | None = None
    product: Product = "hadamard"

    def __post_init__(self) -> None:
        for path, known in FORMS.items():
            forms = self._listed(path)
            for form in forms:
                GLoRAConfig(**{path: form})
            object.__setattr__(self, path, tuple([form for form in known if form in forms]))
        for rank in self._listed("ranks"):
            GLoRAConfig(rank=rank, alpha=self.alpha, product=self.product)
        object.__setattr__(self, "ranks", tuple(sorted(set(self.ranks))))

    def _listed(self, field: str) -> Collection[Any]:
        choices = getattr(self, field)
        if isinstance(choices, str) or not isinstance(choices, Collection) or not choices:
            raise ValueError(f"{field} of a Space must list at least one choice; found {choices!r}.")
        return choices  # pyright: ignore[reportUnknownVariableType]

    @property
    def forms(self) -> dict[str, tuple[str, ...]]:
        """Path to its forms, the dearest first."""
        return {path: getattr(self, path) for path in FORMS}

    @property
    def largest(self) -> GLoRAConfig:
        """The dearest form of every path, at the highest rank."""
        return self.config({path: forms[0] for path, forms in self.forms.items()}, max(self.ranks))

    def config(self, forms: dict[str, str], rank: int) -> GLoRAConfig:
        """These forms as a config: paths left out are none; without a low-rank path the rank is the lowest.

        Example:
            >>> Space(ranks=[2, 8]).config({"B": "vector"}, 8).rank
            2
        """
        full: dict[str, Any] = {path: forms.get(path, "none") for path in FORMS}
        rank = rank if "lora" in full.values() else min(self.ranks)
        return GLoRAConfig(**full, rank=rank, alpha=self.alpha, product=self.product, balance="none")

    @functools.cache  # noqa: B019 - spaces are few and small
    def only(self, *paths: str) -> Space:
        """The space of a layer that has these paths alone (C, D and E need a bias)."""
        return replace(self, **{path: ("none",) for path in FORMS if path not in paths})

    def why_not(self, config: GLoRAConfig) -> str | None:
        """Why a config is not in this space; None if it is."""
        ranks = self.ranks if "lora" in config.forms.values() else (config.rank,)
        options = {"alpha": (self.alpha,), "product": (self.product,), "rank_dropout": (0.0,), "create_bias": (False,)}
        for field, choices in {**self.forms, "rank": ranks, **options}.items():
            if (value := getattr(config, field)) not in choices:
                return f"{field}={value!r}, where {field} may be {' or '.join(map(str, choices))}"
        return None
