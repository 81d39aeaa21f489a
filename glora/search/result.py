"""What a search has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from glora.config import GLoRAConfig


@dataclass(frozen=True)
class Trial:
    """One evaluated choice.

    Attributes:
        number: its place in the study.
        targets: path of a layer to its forms; layers without any are left out.
        parameters: how many numbers its paths have, heads left out.
        score: what `evaluate` gave; None where it raised or gave no number.
        error: why there is no score.
    """

    number: int
    targets: Mapping[str, GLoRAConfig] = field(repr=False)
    parameters: int
    score: float | None
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """What a search has found.

    Attributes:
        targets: the best choice, path of a layer to its forms, for `choose`, `extract` and `glora.apply`.
        score: its score.
        parameters: how many numbers its paths have, heads left out.
        trials: all that were evaluated, in order.
        front: those that no other beats in score without more parameters, from the fewest parameters up.
    """

    targets: Mapping[str, GLoRAConfig] = field(repr=False)
    score: float
    parameters: int
    trials: Sequence[Trial] = field(repr=False)
    front: Sequence[Trial] = field(repr=False)


def result_of(trials: Sequence[Trial]) -> Result:
    """The best of some trials, with fewer parameters where scores are equal.

    Raises:
        RuntimeError: none has a score.
    """
    scored = sorted([(-each.score, each.parameters, each.number, each) for each in trials if each.score is not None])
    if not scored:
        last = next((trial.error for trial in reversed(trials)), "no trial was made")
        raise RuntimeError(
            f"A search needs one evaluation at least that gives a number; of {len(trials)} none did: {last}"
        )
    front: list[Trial] = []
    for *_, trial in scored:
        if not front or trial.parameters < front[-1].parameters:
            front.append(trial)
    best = front[0]
    return Result(best.targets, -scored[0][0], best.parameters, trials, front[::-1])
