r"""GLoRA as pure functions on tensors: the only place where the formula stands.

A linear layer `y = x W0^T + b0` becomes `y = x W'^T + b'` with

$$W' = W_0 + W_0 \ast A + B, \qquad b' = b_0 + b_0 \odot D + E + W_0 C,$$

where `*` is elementwise (`product="hadamard"`) or a matrix product (`product="matmul"`). Source: GLoRA,
arXiv 2306.07967, equation 9; the elementwise reading is that of the authors' code and of Hugging Face PEFT, the matrix
product that of the paper's figure and of LyCORIS.

A *path* (A to E) is `None`, a tensor that broadcasts, or a pair `(left, right)` whose matrix product it stands for:

| path             | pair                       | vector       | constant | whole       |
|------------------|----------------------------|--------------|----------|-------------|
| A (hadamard), B  | `(out, r)`, `(r, in)`      | `(out, 1)`   | `(1,)`   | `(out, in)` |
| A (matmul)       | `(in, r)`, `(r, in)`       | `(1, in)`    | `(1,)`   | `(in, in)`  |
| C                | `(in, r)`, `(r, 1)`        | `(in, 1)`    | -        | -           |
| D, E             | -                          | `(out,)`     | `(1,)`   | -           |

Scaling (`alpha / rank`, an adapter's weight) is the caller's: scale `left`, or the tensor.

Inside the library W0 may also be a batch of matrices, `(batch, out, in)`, with paths for each of them: every shape
above then has the batch in front, and a constant is `(batch, 1, 1)`, or `(batch, 1)` for D and E.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glora.precision import multiply, wide

Path: TypeAlias = Tensor | tuple[Tensor, Tensor] | None
Product: TypeAlias = Literal["hadamard", "matmul"]

PRODUCTS: tuple[Product, ...] = ("hadamard", "matmul")


ONE = torch.ones((), dtype=torch.float64, device="cpu")
"""The weight of an adapter that acts alone: this very tensor, by which eager code tells that nothing is scaled."""


def is_one(scale: Tensor) -> bool:
    """Whether a scale is `ONE` and need not be multiplied by; a compiled graph takes any."""
    return not torch.compiler.is_compiling() and scale is ONE


class Factors(NamedTuple):
    """A path as a layer holds it: its own tensors, and the scale that they are multiplied by.

    Attributes:
        tensors: a pair `(left, right)`, or a vector or constant.
        scale: 0-dimensional, or for a pair `(r,)`, one number for each of its components.
    """

    tensors: Tensor | tuple[Tensor, Tensor]
    scale: Tensor

    def scaled(self) -> Tensor | tuple[Tensor, Tensor]:
        """The path as the functions of this module take it. Scaling `left` is cheaper than scaling the product."""
        scaled = not is_one(self.scale)
        if isinstance(self.tensors, Tensor):
            return wide(self.tensors) * self.scale if scaled else wide(self.tensors)
        left, right = self.tensors
        return wide(left) * self.scale if scaled else wide(left), right


class WeightFactors(NamedTuple):
    """One adapter's paths on a weight; None where a path is none."""

    A: Factors | None
    B: Factors | None
    product: Product


def weight(W0: Tensor, A: Path = None, B: Path = None, *, product: Product = "hadamard") -> Tensor:
    r"""The adapted weight $W' = W_0 + W_0 \ast A + B$.

    Args:
        W0: frozen weight, `(out, in)`, any floating dtype.
        A: scales the weight; B: shifts it. None, a tensor or a pair, in the shapes of this module's table.
        product: what `*` means: `"hadamard"` (elementwise) or `"matmul"` (`W0 @ A`).

    Returns:
        W', `(out, in)`, dtype of W0: computed in float32 at least and rounded once (Note [Rounded once]), whether or
        not autocast is on.

    Raises:
        ValueError: a path whose shape is not in the table, or a product that is neither of the two.

    Example:
        >>> import torch
        >>> from glora import functional
        >>> W0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> functional.weight(W0, A=torch.tensor([[1.0], [0.0]]), B=torch.tensor([0.5]))
        tensor([[2.5000, 4.5000],
                [3.5000, 4.5000]])
        >>> functional.weight(W0, A=torch.tensor([[1.0, 0.0]]), product="matmul")
        tensor([[2., 2.],
                [6., 4.]])
    """
    check_weight_paths(W0, A, B, product)
    return add(W0, [weight_update(W0, A, B, product=product)])


def bias(W0: Tensor, b0: Tensor | None, C: Path = None, D: Path = None, E: Path = None) -> Tensor | None:
    r"""The adapted bias $b' = b_0 + b_0 \odot D + E + W_0 C$.

    Args:
        W0: frozen weight, `(out, in)`: the very W0, also where the layer's weight has become W'.
        b0: frozen bias, `(out,)`, or None.
        C: prompt, a constant added to the layer's input; D: scales the bias; E: shifts it. In the shapes of this
            module's table.

    Returns:
        b', `(out,)`, dtype of b0 (of W0 where there is none), rounded once; None where neither a bias nor a path is.

    Raises:
        ValueError: a path whose shape is not in the table, or D without a bias to scale.

    Example:
        >>> import torch
        >>> from glora import functional
        >>> W0, b0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0])
        >>> functional.bias(W0, b0, C=torch.tensor([[1.0], [1.0]]), E=torch.tensor([10.0]))
        tensor([14., 16.])
    """
    check_bias_paths(W0, b0, C, D, E)
    if b0 is None:
        if C is None and E is None:
            return None
        b0 = W0.new_zeros(W0.shape[0])
    others = cast("tuple[Tensor | None, Tensor | None]", (D, E))
    return add(b0, [bias_update(b0, None if C is None else prompted(W0, C), *others)])


def linear(
    x: Tensor,
    W0: Tensor,
    b0: Tensor | None = None,
    A: Path = None,
    B: Path = None,
    C: Path = None,
    D: Path = None,
    E: Path = None,
    *,
    product: Product = "hadamard",
) -> Tensor:
    """The adapted layer `x W'^T + b'`: `torch.nn.functional.linear` with `weight` and `bias` of this module.

    Args:
        x: input, `(..., in)`.
        W0: frozen weight, `(out, in)`.
        b0: frozen bias, `(out,)`, or None.
        A: see `weight`, as B; C, D, E: see `bias`.
        product: see `weight`.

    Returns:
        `(..., out)`, in the dtype that `torch.nn.functional.linear` gives (under autocast, autocast's).

    Raises:
        ValueError: as `weight` and `bias` do.

    Example:
        >>> import torch
        >>> from glora import functional
        >>> x, W0 = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> left, right = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 0.0]])
        >>> functional.linear(x, W0, B=(left, right))
        tensor([[4., 8.]])
    """
    return F.linear(x, weight(W0, A, B, product=product), bias(W0, b0, C, D, E))


def weight_update(W0: Tensor, A: Path = None, B: Path = None, *, product: Product = "hadamard") -> Tensor | None:
    """What one adapter adds to W0, `W0 * A + B`, unrounded in `working_dtype`.

    The shapes are taken as right (`weight` checks them). The result broadcasts to `(out, in)`; None where neither
    path is. `add` puts the updates of several adapters on one W0.
    """
    scaled = None
    if A is not None:
        scaled = wide(W0) * whole(A) if product == "hadamard" else _matmul(wide(W0), A)
    if B is None:
        return scaled
    return whole(B) if scaled is None else scaled + whole(B)


def adapted_weight(W0: Tensor, adapters: Iterable[WeightFactors]) -> Tensor:
    """`W0 + sum_i (W0 * A_i + B_i)` over several adapters, rounded once; W0 itself where there is none."""
    return add(W0, weight_updates(W0, adapters))


def weight_updates(W0: Tensor, adapters: Iterable[WeightFactors]) -> list[Tensor | None]:
    """What each of several adapters adds to W0, as `weight_update` says."""
    updates: list[Tensor | None] = []
    for A, B, product in adapters:
        paths = None if A is None else A.scaled(), None if B is None else B.scaled()
        updates.append(weight_update(W0, *paths, product=product))
    return updates


def bias_update(
    b0: Tensor, prompt: Tensor | None = None, D: Tensor | None = None, E: Tensor | None = None
) -> Tensor | None:
    """What one adapter adds to b0, `b0 * D + E + prompt`, unrounded in `working_dtype`.

    The shapes are taken as right (`bias` checks them). `prompt` is `prompted(W0, C)`, `(out,)`. The result broadcasts
    to `(out,)`; None where no path is.
    """
    total = prompt
    if E is not None:
        total = wide(E) if total is None else total + E
    if D is not None:
        b0 = wide(b0)
        total = b0 * D if total is None else torch.addcmul(total, b0, D)
    return total


def prompted(W0: Tensor, C: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """What a prompt adds to the output, `W0 C`, `(out,)`, in `working_dtype`."""
    return multiply(W0, whole(C)).squeeze(-1)


def add(base: Tensor, updates: Iterable[Tensor | None]) -> Tensor:
    """`base + sum(updates)` in `working_dtype`, rounded once to base's dtype (Note [Rounded once]).

    Without an update this is `base` itself: the same tensor, not a copy.
    """
    total = None
    for update in updates:
        if update is not None:
            total = update if total is None else total + update
    if total is None:
        return base
    total = wide(base) + total
    return total if total.dtype is base.dtype else total.to(base.dtype)


def whole(path: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The tensor that a path stands for: itself, or the product of its pair in `working_dtype`."""
    return path if isinstance(path, Tensor) else multiply(*path)


def _matmul(W0: Tensor, A: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    if not isinstance(A, Tensor):
        return multiply(multiply(W0, A[0]), A[1])  # two thin products, and no (in, in) matrix
    if A.shape[-2:] == (W0.shape[-1], W0.shape[-1]):
        return multiply(W0, A)
    return W0 * A  # a diagonal matrix, kept as its diagonal


def check_weight_paths(W0: Tensor, A: Path, B: Path, product: str) -> None:
    """Raise ValueError unless A and B have shapes of this module's table for W0 and product."""
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {', '.join(map(repr, PRODUCTS))}; found {product!r}.")
    if W0.ndim != 2:
        raise ValueError(f"W0 must be a matrix (out, in); found a tensor of shape {tuple(W0.shape)}.")
    o, i = W0.shape
    if product == "hadamard":
        _check_path("A", A, pair=(o, i), tensors=[(o, 1), (1,), (o, i)])
    else:
        _check_path("A", A, pair=(i, i), tensors=[(1, i), (1,), (i, i)])
    _check_path("B", B, pair=(o, i), tensors=[(o, 1), (1,), (o, i)])


def check_bias_paths(W0: Tensor, b0: Tensor | None, C: Path, D: Path, E: Path) -> None:
    """Raise ValueError unless C, D and E have shapes of this module's table for W0 and b0."""
    check_weight_paths(W0, None, None, "hadamard")
    o, i = W0.shape
    if b0 is not None and b0.shape != (o,):
        raise ValueError(f"b0 must have the shape {(o,)}; found {tuple(b0.shape)}.")
    if b0 is None and D is not None:
        raise ValueError("D scales the bias; found b0=None. Leave D out, or give b0 as zeros.")
    _check_path("C", C, pair=(i, 1), tensors=[(i, 1)])
    _check_path("D", D, pair=None, tensors=[(o,), (1,)])
    _check_path("E", E, pair=None, tensors=[(o,), (1,)])


def _check_path(name: str, path: Path, *, pair: tuple[int, int] | None, tensors: list[tuple[int, ...]]) -> None:
    if path is None:
        return
    allowed = " or ".join(str(shape) for shape in dict.fromkeys(tensors))
    if pair is not None:
        allowed += f", or a pair of ({pair[0]}, r) and (r, {pair[1]})"
    if isinstance(path, Tensor):
        if tuple(path.shape) not in tensors:
            raise ValueError(f"Path {name} must have the shape {allowed}; found {tuple(path.shape)}.")
        return
    left, right = path
    found = f"({tuple(left.shape)}, {tuple(right.shape)})"
    if left.ndim != 2 or right.ndim != 2 or (*left.shape[:1], *right.shape[1:]) != pair or left.shape[1] != len(right):
        raise ValueError(f"Path {name} must have the shape {allowed}; found the pair {found}.")
