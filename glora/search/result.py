"""What a search has found, and a choice as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    scored = [(-trial.score, trial.parameters, trial.number, trial) for trial in trials if trial.score is not None]
    if not scored:
        last = next((trial.error for trial in reversed(trials)), "no trial was made")
        raise RuntimeError(
            f"A search needs one evaluation at least that gives a number; of {len(trials)} none did: {last}"
        )
    scored.sort(key=lambda row: row[:3])
    front: list[Trial] = []
    for *_, trial in scored:
        if not front or trial.parameters < front[-1].parameters:
            front.append(trial)
    best = front[0]
    return Result(best.targets, -scored[0][0], best.parameters, trials, front[::-1])


def write_targets(targets: Mapping[str, GLoRAConfig], file: str | os.PathLike[str]) -> None:
    """Write a choice as JSON.

    Example:
        >>> import tempfile, pathlib, glora
        >>> file = pathlib.Path(tempfile.mkdtemp(), "choice.json")
        >>> glora.search.write_targets({"0": glora.GLoRAConfig.lora(rank=4)}, file)
        >>> glora.search.read_targets(file) == {"0": glora.GLoRAConfig.lora(rank=4)}
        True
    """
    Path(file).write_text(json.dumps({path: asdict(config) for path, config in targets.items()}, indent=1) + "\n")


def read_targets(file: str | os.PathLike[str]) -> dict[str, GLoRAConfig]:
    """The choice that `write_targets` wrote.

    Raises:
        ValueError: no such file's contents.
    """
    try:
        choices: dict[str, dict[str, Any]] = json.loads(Path(file).read_text())
        older: dict[str, Any] = {"balance": "none"}  # of files that do not say
        return {path: GLoRAConfig(**older | fields) for path, fields in choices.items()}
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{os.fspath(file)!r} must be what write_targets wrote; it is not ({error}).") from error
