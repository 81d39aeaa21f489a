"""LyCORIS's methods: one layer's tensors, read as glora's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora.config import GLoRAConfig
from glora.interop.low_rank import Pair, elementwise, kronecker, whole, within
from glora.interop.lycoris.held import Held
from glora.precision import multiply, wide
from glora.spec import LayerSpec

# Note [LyCORIS's methods]
# Each is an update of the weight; the bias stays, but for `diff_b`, which is added to it (E). With s = alpha / rank (an
# alpha of 0, or none at all, means the rank), and a kernel's axes behind those of the inputs:
#
# LoRA, LoCon: s lora_up lora_down: B. `lora_mid` (r, r, kernel) between the two: its product with lora_down is right.
# LoHa: s (w1_a w1_b) * (w2_a w2_b), elementwise: B. `hada_t1`, `hada_t2`: cores of a kernel's decomposition.
# LoKr: s w1 (x) w2, each whole or of two factors, and s = 1 where both are whole: B.
# full: `diff`, the update itself: B of the rank that it has.
# GLoRA: s (W0 A + B), see `read_glora`.
# IA3: W0 times 1 + weight, by rows, or by the channels of the inputs where `on_input`: A.
# norms: `w_norm` and `b_norm`, or `diff` and `diff_b`, added to the weight and bias of what is no matrix: a head.
#
# `dora_scale` m beside an update D gives g (W0 + D) with g = m / norm(W0 + D), one number a row, (out, 1, ...), or one
# an input channel, (1, in, ...), as the shape says: A = g - 1, and B is g D. LyCORIS adds eps to the norm. diffusers'
# files have PEFT's `lora_magnitude_vector` in its place, always by rows.
#
# A reader pops each tensor that it uses; none may be left.


class Read(NamedTuple):
    """What a layer of a file becomes: a layer, or a head where `layer` is None.

    Attributes:
        layer: its description.
        tensors: key within the layer to tensor.
    """

    layer: LayerSpec | None
    tensors: dict[str, Tensor]


class ShapeError(ValueError):
    """The tensors are a known method's, of another layer's sizes."""


Reader = Callable[[Held, dict[str, Tensor], bool], Read]


def _scale(parts: dict[str, Tensor], rank: int) -> float:
    """alpha, as a number; the rank where it is 0 or not there."""
    alpha = parts.pop("alpha", None)
    if alpha is None:
        return float(rank)
    number = float(alpha)  # raises where it is no number
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"alpha is {number}, and must be a number of at least 0")
    return number or float(rank)


def _check(held: Held, rows: int, columns: int) -> None:
    """Raise where an update has another size than the weight, before anything of that size is made."""
    if (rows, columns) != held.sizes:
        raise ShapeError(f"an update of {(rows, columns)} where the weight is {held.sizes}")


def _joined(held: Held, a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """The product of a kernel's core `(r, r, kernel)` and `b` `(r, inputs)`: `(r, inputs kernel)`."""
    if tuple(core.shape[2:]) != held.kernel or core.shape[:2] != (a.shape[1], len(b)):
        raise ShapeError(f"a core of {tuple(core.shape)} where the kernel is {held.kernel}")
    return torch.einsum("i j ..., j r -> i r ...", wide(core), wide(b)).flatten(1)


def _factors(held: Held, parts: dict[str, Tensor], name: str, core_name: str) -> Pair:
    """`a @ b`, or the decomposition of a kernel, `a^T (core b)`."""
    a, b, core = wide(parts.pop(f"{name}_a")), wide(parts.pop(f"{name}_b")), parts.pop(core_name, None)
    if core is None:
        return a, b.flatten(1)
    return a.mT, _joined(held, a.mT, core, b)


def _shift(held: Held, parts: dict[str, Tensor], pair: Pair, alpha: float | None = None) -> Read:
    """An update `alpha / rank * left @ right` as B, with the magnitudes beside it, and the bias's."""
    left, right = pair
    rank = left.shape[1]
    if len(right) != rank:
        raise ShapeError(f"factors of {tuple(left.shape)} and {tuple(right.shape)}")
    _check(held, len(left), right.shape[1])
    config = GLoRAConfig.lora(rank=rank, alpha=alpha)
    layer = LayerSpec(config, *held.sizes, matrix=held.matrix)
    magnitude, bias = parts.pop("dora_scale", None), parts.pop("diff_b", None)
    if "lora_magnitude_vector" in parts:  # PEFT's, by rows, of other axes
        magnitude = parts.pop("lora_magnitude_vector").flatten()
    tensors = {"B.left": left, "B.right": right}
    if magnitude is not None:
        layer, tensors = _decomposed(held, layer, left, right, magnitude)
    if bias is not None:
        if bias.shape != left.shape[:1]:
            raise ShapeError(f"a bias of {tuple(bias.shape)} where there are {len(left)} outputs")
        layer = replace(layer, config=replace(layer.config, E="vector", create_bias=True))
        tensors["E.value"] = wide(bias)
    return Read(layer, tensors)


def _decomposed(
    held: Held, layer: LayerSpec, left: Tensor, right: Tensor, magnitude: Tensor
) -> tuple[LayerSpec, dict[str, Tensor]]:
    rows, columns, rest = held.sizes[0], held.channels, (1,) * len(held.kernel)
    by_rows = tuple(magnitude.shape) in ((rows, 1, *rest), (rows, 1), (rows,))
    if not by_rows and tuple(magnitude.shape) not in ((1, columns, *rest), (1, columns)):
        raise ShapeError(f"dora_scale of {tuple(magnitude.shape)} where the weight is {held.shape}")
    left, right = wide(left) * layer.config.scaling, wide(right)
    kernel = math.prod(held.kernel)
    g = wide(magnitude).flatten() / norms(held.weight() + multiply(left, right), by_rows, kernel)
    g = (g if by_rows else g.repeat_interleave(kernel)).to(left.dtype).unsqueeze(1 if by_rows else 0)
    forms: dict[str, Any] = {"A": "vector", "product": "hadamard" if by_rows else "matmul"}
    left, right = (left * g, right) if by_rows else (left, right * g)
    config = replace(layer.config, alpha=None, **forms)
    return replace(layer, config=config), {"A.value": g - 1, "B.left": left, "B.right": right}


def norms(weight: Tensor, by_rows: bool, kernel: int) -> Tensor:
    """What a magnitude is divided by: the norm of each row of a weight, or of each input channel, and LyCORIS's eps."""
    squares = weight.double().square()
    total = squares.sum(1) if by_rows else squares.reshape(len(weight), -1, kernel).sum((0, 2))
    return total.sqrt() + torch.finfo(torch.float32).eps


def read_lora(held: Held, parts: dict[str, Tensor], _rs_lora: bool) -> Read:
    """LoRA and LoCon (arXiv 2106.09685)."""
    left, right, core = parts.pop("lora_up.weight"), parts.pop("lora_down.weight"), parts.pop("lora_mid.weight", None)
    left, right = left.flatten(1), right.flatten(1)
    if core is not None:
        right = _joined(held, left, core, right)
    return _shift(held, parts, (left, right), _scale(parts, left.shape[1]))


def read_loha(held: Held, parts: dict[str, Tensor], _rs_lora: bool) -> Read:
    """LoHa (arXiv 2108.06098), of the rank r^2."""
    one, other = (_factors(held, parts, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
    rank = one[0].shape[1]
    for left, right in (one, other):
        _check(held, len(left), right.shape[1])
        if left.shape[1] != len(right):
            raise ShapeError(f"factors of {tuple(left.shape)} and {tuple(right.shape)}")
    left, right = elementwise(one, other)
    return _shift(held, parts, (left * (_scale(parts, rank) / rank), right))


def read_lokr(held: Held, parts: dict[str, Tensor], _rs_lora: bool) -> Read:
    """LoKr (arXiv 2212.10650)."""
    rank, factors = None, list[tuple[Tensor, Tensor | None]]()
    for n in (1, 2):
        matrix = parts.pop(f"lokr_w{n}", None)
        if matrix is None:
            left, right = _factors(held, parts, f"lokr_w{n}", f"lokr_t{n}")
            rank = left.shape[1] if rank is None else rank
            factors.append((left, right))
        else:
            factors.append((wide(matrix).flatten(1), None))
    (rows, columns), (more_rows, more_columns) = ((len(a), (a if b is None else b).shape[1]) for a, b in factors)
    _check(held, rows * more_rows, columns * more_columns)
    one, other = (whole(a) if b is None else within(a, b) for a, b in factors)
    alpha = _scale(parts, rank or 1)
    left, right = kronecker(one, other)
    return _shift(held, parts, (left if rank is None else left * (alpha / rank), right))


def read_full(held: Held, parts: dict[str, Tensor], _rs_lora: bool) -> Read:
    """The update itself, as LyCORIS's `full` and extractions have it."""
    diff = parts.pop("diff", None)
    if held.matrix is None:
        return _head(held, diff, parts.pop("diff_b", None))
    if diff is None:
        config = GLoRAConfig.bitfit(create_bias=True)
        rows, columns = held.sizes
        return Read(LayerSpec(config, rows, columns, matrix=held.matrix), {"E.value": wide(parts.pop("diff_b"))})
    if tuple(diff.shape) != held.shape:
        raise ShapeError(f"an update of {tuple(diff.shape)} where the weight is {held.shape}")
    return _shift(held, parts, _of_its_rank(held.matrix.read(wide(diff))))


def _of_its_rank(matrix: Tensor) -> Pair:
    """A matrix as a pair of the rank that it has, to the rounding of its numbers; itself and an identity if whole."""
    tall = len(matrix) > matrix.shape[1]
    rows = (matrix.mT if tall else matrix).double()
    linalg: Any = torch.linalg
    found: tuple[Tensor, Tensor] = linalg.eigh(rows @ rows.mT)
    energies, vectors = found[0].clamp(min=0), found[1]  # the least energy first
    rank = max(1, int((energies.cumsum(0) > 1e-14 * energies.sum()).sum()))
    if rank == len(rows):
        return whole(matrix)
    basis = vectors[:, -rank:]
    left, right = basis.to(matrix.dtype), (basis.mT @ rows).to(matrix.dtype)
    return (right.mT, left.mT) if tall else (left, right)


def read_norm(held: Held, parts: dict[str, Tensor], _rs_lora: bool) -> Read:
    """What is added to the weight and bias of a norm."""
    return _head(held, parts.pop("w_norm"), parts.pop("b_norm", None))


def _head(held: Held, weight: Tensor | None, bias: Tensor | None) -> Read:
    """A module whose weight and bias are trained by what is added to them, as a head."""
    tensors = held.tensors()
    for name, change in (("weight", weight), ("bias", bias)):
        if change is None:
            continue
        if name not in tensors or change.shape != tensors[name].shape:
            found = tuple(tensors[name].shape) if name in tensors else "none"
            raise ShapeError(f"{tuple(change.shape)} is added to its {name} of {found}")
        tensors[name] = tensors[name] + wide(change)
    return Read(None, tensors)


def read_ia3(held: Held, parts: dict[str, Tensor], _rs_lora: bool) -> Read:
    """IA3 (arXiv 2205.05638) as LyCORIS has it: the bias is not scaled."""
    weight, on_input = wide(parts.pop("weight")).flatten(), bool(parts.pop("on_input").item())
    rows, columns = held.sizes
    channels = held.channels if on_input else rows
    if len(weight) != channels:
        raise ShapeError(f"{len(weight)} numbers for {channels} {'inputs' if on_input else 'outputs'}")
    nothing: dict[str, Any] = dict.fromkeys("BCDE", "none")
    config = GLoRAConfig(A="vector", **nothing, product="matmul" if on_input else "hadamard")
    value = weight.repeat_interleave(columns // channels).unsqueeze(0) if on_input else weight.unsqueeze(1)
    return Read(LayerSpec(config, rows, columns, matrix=held.matrix), {"A.value": value})


# Note [LyCORIS's GLoRA]
# W' = W0 + (W0 A + B) alpha / r, or alpha / sqrt(r) where it was trained with rs_lora, which the file does not say.
# Since version 3 of LyCORIS A = a1 a2 and B = b1 b2, with a1 (in, r), a2 (r, in), b1 (out, r) and b2 (r, in); before,
# A = a2 a1 and B = b2 b1, with the shapes exchanged. The shapes of the model's layers tell the two apart, unless
# in = out = r; then the layout counts as today's.
#
# In a convolution A mixes the channels of W0, the same way at each place of its kernel: as a matrix of the weight's
# columns it is A (x) I, of the rank r k for a kernel of k places. B then has r components and k r - r zeros. `bm` is a
# core of B's kernel.
GLORA = {"A.left": "a1.weight", "A.right": "a2.weight", "B.left": "b1.weight", "B.right": "b2.weight"}
GLORA_FORMS: dict[str, Any] = {"A": "lora", "B": "lora", "C": "none", "D": "none", "E": "none", "product": "matmul"}


def read_glora(held: Held, parts: dict[str, Tensor], rs_lora: bool) -> Read:
    """GLoRA (arXiv 2306.07967), of either layout (Note [LyCORIS's GLoRA])."""
    matrices, core = [parts.pop(key) for key in GLORA.values()], parts.pop("bm.weight", None)
    a1, a2, b1, b2 = matrices
    if not _fit(held, matrices, core is not None):
        matrices = a1, a2, b1, b2 = [a2, a1, b2, b1]
    if not _fit(held, matrices, core is not None):
        shapes = [tuple(matrix.shape) for matrix in matrices]
        raise ShapeError(f"tensors of {shapes}, which are of neither layout for a weight of {held.shape}")
    a1, a2, b1, b2 = (matrix.flatten(1) for matrix in matrices)
    b2 = b2 if core is None else _joined(held, b1, core, b2)
    rank, kernel = a1.shape[1], math.prod(held.kernel)
    alpha = _scale(parts, rank) * (math.sqrt(rank) if rs_lora else 1)
    if kernel > 1:
        eye = torch.eye(kernel)
        a1, a2 = (torch.kron(factor, eye.to(factor)) for factor in within(wide(a1), wide(a2)))
        b1, b2 = padded(*within(wide(b1), wide(b2)), a1.shape[1])
        alpha, rank = alpha / rank * a1.shape[1], a1.shape[1]
    layer = LayerSpec(
        GLoRAConfig(**GLORA_FORMS, rank=rank, alpha=alpha, balance="none"), *held.sizes, matrix=held.matrix
    )
    return Read(layer, dict(zip(GLORA, (a1, a2, b1, b2), strict=True)))


def padded(left: Tensor, right: Tensor, rank: int) -> Pair:
    """A pair with components of zeros, up to a rank."""
    columns, rows = left.new_zeros(len(left), rank - left.shape[1]), right.new_zeros(rank - len(right), right.shape[1])
    return torch.cat([left, columns], 1), torch.cat([right, rows])


def _fit(held: Held, matrices: list[Tensor], has_core: bool) -> bool:
    """Whether a1, a2, b1 and b2 are of today's layout for this weight."""
    if held.matrix is None or any(matrix.ndim < 2 for matrix in matrices):
        return False
    flat = [tuple(matrix.flatten(1).shape) for matrix in matrices]
    rank, (rows, columns), channels = flat[0][1], held.sizes, held.channels
    return flat == [(channels, rank), (rank, channels), (rows, rank), (rank, channels if has_core else columns)]
