"""The paths that come closest to a given change of one layer, by least squares."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor

from glora.arithmetic.low_rank import linalg, nearest, norm, widened
from glora.config import WEIGHT_PATHS, GLoRAConfig
from glora.functional import weight_update, whole

# Note [Nearest adapter]
# Each path alone has a nearest one: B by the singular values of the change; a vector or a constant in closed form; an A
# of the matrix product by those of the change's part in W0's columns, which W0's pseudo-inverse takes back. An
# elementwise low-rank A is a weighted low-rank problem, without a closed form: its rows for given columns, and its
# columns for given rows, are small least squares problems, solved in turn. A and B together: each in turn for what the
# other leaves. No step makes the error larger, and B comes first, or A; the better of the two is kept.
_ROUNDS, _SWEEPS, _ENOUGH = 30, 30, 1e-4
_RIDGE = 1e-11  # of a problem's own size: what makes it solvable where a row or column of W0 is zero

Path = Tensor | tuple[Tensor, Tensor]


def fit_weight(W0: Tensor, change: Tensor, config: GLoRAConfig) -> tuple[dict[str, Path], Tensor]:
    """A and B of a config that bring `W0 * A + B` closest to a change, and what they leave (Note [Nearest adapter]).

    Args:
        W0: `(out, in)`, float64, as is the change.
        change: what is to be added to W0.
        config: the forms, rank and product.

    Returns:
        The paths as `glora.functional` takes them, unscaled, and the rest of the change.
    """
    wanted = [path for path in reversed(WEIGHT_PATHS) if path in config.paths]
    tries = [_in_turn(W0, change, config, order) for order in permutations(wanted)]
    return min(tries, key=lambda found: norm(found[1]))


def _in_turn(W0: Tensor, change: Tensor, config: GLoRAConfig, order: tuple[str, ...]) -> tuple[dict[str, Path], Tensor]:
    paths: dict[str, Path] = {}
    rest, before = change, norm(change)
    for _ in range(_ROUNDS):
        for name in order:
            if name in paths:
                rest = rest + _effect(W0, name, paths[name], config)
            paths[name] = _fit(W0, rest, name, config, paths.get(name))
            rest = rest - _effect(W0, name, paths[name], config)
        error = norm(rest)
        if len(order) < 2 or before - error <= _ENOUGH * before:
            break
        before = error
    return paths, rest


def _effect(W0: Tensor, name: str, path: Path, config: GLoRAConfig) -> Tensor:
    update = weight_update(W0, product=config.product, **{name: path})
    return torch.zeros_like(W0) if update is None else update.expand_as(W0)


def _fit(W0: Tensor, rest: Tensor, name: str, config: GLoRAConfig, before: Path | None) -> Path:
    """One path for what the other leaves, from where it was before."""
    form, rank = config.forms[name], config.rank
    matmul = name == "A" and config.product == "matmul"
    if form == "lora":
        if matmul:
            inverse: Tensor = linalg.pinv(W0)
            left, right = nearest(W0 @ (inverse @ rest), rank)
            return inverse @ left, right
        weights = W0 if name == "A" else torch.ones_like(W0)
        if isinstance(before, tuple):
            return _swept(weights, rest, before, sweeps=2)
        if name == "B":
            return nearest(rest, rank)
        return min(_weighted(W0, rest, rank), key=lambda pair: norm(rest - W0 * whole(pair)))
    weights = W0 if name == "A" else torch.ones_like(W0)
    above, below = weights * rest, weights.square()
    if form == "constant":
        return _ratio(above.sum(), below.sum()).reshape(1)
    axis = 0 if matmul else 1
    return _ratio(above.sum(axis, keepdim=True), below.sum(axis, keepdim=True))


def _weighted(W0: Tensor, rest: Tensor, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Low-rank A's near `rest / W0`, from two starts: the quotient, and one without a say of small entries."""
    squares = W0.square()
    for damping in (1e-12, 0.1):
        start = nearest(_ratio(W0 * rest, squares + damping * squares.mean()), rank)
        yield _swept(W0, rest, start, _SWEEPS)


def _swept(weights: Tensor, rest: Tensor, pair: tuple[Tensor, Tensor], sweeps: int) -> tuple[Tensor, Tensor]:
    """A pair nearer to `rest` in `||rest - weights * (left @ right)||`: rows and columns in turn."""
    squares, products = weights.square(), weights * rest
    left, right = pair
    before = norm(rest - weights * (left @ right))
    for _ in range(sweeps):
        left = _rows(squares, products, right)
        right = _rows(squares.mT, products.mT, left.mT).mT
        error = norm(rest - weights * (left @ right))
        if before - error <= _ENOUGH * before:
            break
        before = error
    return left, right


def _rows(squares: Tensor, products: Tensor, right: Tensor) -> Tensor:
    """Each row of `left` by itself: `(right W_i^2 right^T) left_i = right W_i^2 rest_i`."""
    rank = len(right)
    pairs = (right[:, None] * right[None]).reshape(rank * rank, -1)
    grams = (squares @ pairs.mT).reshape(-1, rank, rank)
    size = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = _RIDGE * size + torch.finfo(size.dtype).tiny
    eye = torch.eye(rank, dtype=right.dtype, device=right.device)
    return linalg.solve(grams + ridge[:, None, None] * eye, (products @ right.mT)[..., None])[..., 0]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """`above / below`, 0 where that is nothing by nothing."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)


def fit_bias(W0: Tensor, b0: Tensor | None, change: Tensor, config: GLoRAConfig) -> tuple[dict[str, Path], Tensor]:
    """C, D and E of a config that bring `b0 * D + E + W0 C` closest to a change, and what they leave.

    A vector E is the change itself, and C and D are then zeros. Else all of it is one least squares problem, of which
    the smallest solution is taken.
    """
    forms = {name: form for name, form in config.forms.items() if name in "CDE" and form != "none"}
    blocks: dict[str, Tensor] = {}
    for name, form in forms.items():
        base = W0 if name == "C" else (torch.zeros_like(change) if b0 is None else b0)
        base = torch.ones_like(change) if name == "E" else base
        blocks[name] = base if name == "C" else base.diag() if form == "vector" else base[:, None]
    if forms.get("E") == "vector":
        solved = {name: torch.zeros_like(block[0]) for name, block in blocks.items()} | {"E": change}
    elif blocks:
        solution: Tensor = linalg.pinv(torch.cat(list(blocks.values()), 1)) @ change
        sizes = [block.shape[1] for block in blocks.values()]
        solved = dict(zip(blocks, torch.split(solution, sizes), strict=True))
    else:
        return {}, change
    rest = change - sum((blocks[name] @ value for name, value in solved.items()), torch.zeros_like(change))
    paths: dict[str, Path] = dict(solved)
    if "C" in solved:
        vector = solved["C"][:, None]
        one = vector.new_ones(1, 1)
        paths["C"] = vector if forms["C"] == "vector" else widened(vector, one, config.rank)
    return paths, rest
