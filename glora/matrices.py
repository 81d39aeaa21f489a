"""How modules hold their matrices: which of their tensors is one, and how it is laid out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

# Note [Matrices]
# The formula, the forms and the kernels know one thing: a matrix `(out, in)`, or a batch of them, `(batch, out, in)`.
# A module may hold it otherwise: transposed, with the axes of a convolution, as one tensor for all experts. A `Matrix`
# says how, as an einops pattern from the tensor to the matrix; `read` goes that way (a view where it can be), `write`
# goes back. An update is computed on the matrix and written into the tensor's layout before it is added to W0, so that
# W' lies in memory as W0 does. A bias has the shape of the matrix without its last axis.
#
# A matrix has a path in the model, which its adapter's keys begin with: the module's own where the tensor is called
# `weight`, as in a linear layer, and otherwise the tensor's (`experts.gate_up_proj`).


@dataclass(frozen=True)
class Matrix:
    """One matrix of a module (Note [Matrices]).

    Attributes:
        weight: the name of its tensor.
        bias: the name of its bias, whether or not the module has one; None where there can be none.
        pattern: einops, from the tensor to the matrix: `i o -> o i`. Axes to the left of `o` are a batch of matrices.
        swept: whether "all-linear" reaches it; else it must be named.
    """

    weight: str = "weight"
    bias: str | None = "bias"
    pattern: str = "o i -> o i"
    swept: bool = True

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The names of the tensor's axes."""
        return tuple(self.pattern.partition("->")[0].split())

    @cached_property
    def is_plain(self) -> bool:
        """Whether the tensor is the matrix as it stands."""
        return list(self.axes) == self.pattern.partition("->")[2].split()

    @cached_property
    def is_batched(self) -> bool:
        """Whether the tensor is a batch of matrices."""
        return len(re.findall(r"\w+|\([\w ]+\)", self.pattern.partition("->")[2])) == 3

    @cached_property
    def is_linear(self) -> bool:
        """Whether it is held as nn.Linear holds its own."""
        return (self.weight, self.bias, self.pattern) == ("weight", "bias", "o i -> o i")

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor as a matrix `(out, in)`, or a batch of them; itself where it is one."""
        return tensor if self.is_plain else rearrange(tensor, self.pattern)

    def write(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix as the tensor that `read` takes; `like` gives the sizes."""
        if self.is_plain:
            return matrix
        held, wanted = self.pattern.split("->")
        return rearrange(matrix, f"{wanted} -> {held}", **dict(zip(self.axes, like.shape, strict=True)))

    def path(self, module_path: str) -> str:
        """The matrix's path in the model, from its module's."""
        if self.weight == "weight":
            return module_path
        return f"{module_path}.{self.weight}" if module_path else self.weight

    def module_path(self, path: str) -> str:
        """The module's path, from the matrix's."""
        return path.removesuffix(self.path("")).removesuffix(".")


# transformers' linear layer of GPT-2, whose weight is `(in, out)`: its module and name, so that nothing is imported.
CONV1D = "transformers.pytorch_utils", "Conv1D"
LINEAR = Matrix()
TRANSPOSED = Matrix(pattern="i o -> o i")
EMBEDDING = Matrix(bias=None, swept=False)  # `(tokens, features)`: a row is an output, and looked up


def convolution(axes: int) -> Matrix:
    """The matrix of a convolution whose kernel has so many axes: they stand behind those of the inputs."""
    names = " ".join("xyz"[:axes])
    return Matrix(pattern=f"o i {names} -> o (i {names})", swept=False)


Kind: TypeAlias = type[nn.Module] | Callable[[nn.Module], bool]
_registered: list[tuple[Kind, list[Matrix]]] = []


def register_matrix(kind: Kind, tensors: str | Mapping[str, str | None], pattern: str) -> None:
    """Teach glora how a kind of module holds its matrices, so that `targets=` can reach them.

    They are reached where they are named, as convolutions are, and not by "all-linear". A call adds to earlier ones;
    where two name one tensor, the later one counts. What is registered for a kind
    replaces all that glora knows of it by itself. An attached adapter keeps to the registration that it was attached
    under; no second adapter goes onto that tensor until the same registration holds again.

    Args:
        kind: a class of modules, its subclasses included, or a predicate `module -> bool`.
        tensors: the names of the parameters: one, whose bias is `bias`; or a mapping from each to its bias's name, None
            for none. A bias must have the matrix's shape without its last axis.
        pattern: einops, from the parameter's axes to the matrix: `i o -> o i`. The right side has two parts, out and
            in, or three, for a batch of matrices with factors for each; a part may be a group of axes, `(i k)`.

    Raises:
        ValueError: a pattern that is none of these, a kind that is no class of modules and cannot be called, or no
            tensor.

    Example:
        >>> import torch, glora
        >>> class Mixer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.randn(4, 2))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> glora.register_matrix(Mixer, {"kernel": None}, "i o -> o i")
        >>> [key for key, _ in glora.named_parameters(glora.apply(Mixer(), ["kernel"], glora.GLoRAConfig.lora()))]
        ['kernel.B.left', 'kernel.B.right']
    """
    if not (issubclass(kind, nn.Module) if isinstance(kind, type) else callable(kind)):
        raise ValueError(f"A kind must be a class of modules, or a predicate `module -> bool`; found {kind!r}.")
    if not isinstance(tensors, (str, Mapping)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"tensors must be a name, or a mapping from each name to its bias's; found {tensors!r}.")
    named = {tensors: "bias"} if isinstance(tensors, str) else dict(tensors)
    if not named:
        raise ValueError("register_matrix must be given the name of at least one tensor; found none.")
    matrices = [parse_matrix(weight, bias, pattern) for weight, bias in named.items()]
    _registered.insert(0, (kind, matrices))


def parse_matrix(weight: str, bias: str | None, pattern: str) -> Matrix:
    """A matrix as somebody describes it, reached by name alone.

    Raises:
        ValueError: a name that is no string, a pattern of another kind.
    """
    if not all(isinstance(text, str) and text for text in (weight, pattern, "-" if bias is None else bias)):  # pyright: ignore
        raise ValueError(f"A matrix has names and a pattern; found {weight!r}, {bias!r} and {pattern!r}.")
    if weight == bias:
        raise ValueError(
            f"A bias must be another tensor than the matrix that it belongs to; found {weight!r} for both."
        )
    parsed = Matrix(weight, bias, pattern, swept=False)
    if not _is_pattern(parsed):
        raise ValueError(
            f"A pattern must go from the axes of a tensor to a matrix, as `i o -> o i`, or to a batch of them, as "
            f"`e i o -> e o i`, with groups such as `(i k)` on the right alone and a name for each axis, also for one "
            f"of size 1; found {pattern!r}."
        )
    return parsed


def _is_pattern(matrix: Matrix) -> bool:
    """Whether a pattern names each axis once on either side, and einops goes there and back by it."""
    _, arrow, wanted = matrix.pattern.partition("->")
    parts = re.findall(r"\w+|\( *\w[\w ]*\)", wanted)
    sorts = sorted(re.findall(r"\w+", wanted)) == sorted(matrix.axes) and len({*matrix.axes}) == len(matrix.axes)
    known = "".join(parts).replace(" ", "") == wanted.replace(" ", "") and len(parts) in (2, 3)
    if not (arrow and sorts and known):
        return False
    try:
        tensor = torch.empty([2] * len(matrix.axes), device="meta")
        read = rearrange(tensor, matrix.pattern)
        return read.ndim == len(parts) and matrix.write(read, tensor).shape == tensor.shape
    except RuntimeError:  # a name that einops does not take, more axes than torch does
        return False


def matrices_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Matrix]:
    """The matrices that a module of a known kind holds.

    Args:
        module: the module.
        tensors: its own tensors by name, those of the base model where adapters are on them.
    """
    matches = [m for kind, m in _registered if (isinstance(module, kind) if isinstance(kind, type) else kind(module))]
    if matches:  # the latest first
        by_tensor = {matrix.weight: matrix for matrices in matches[::-1] for matrix in matrices}
        return [matrix for name, matrix in by_tensor.items() if name in tensors]
    if isinstance(module, nn.Linear):
        return [LINEAR]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return [convolution(len(module.kernel_size))]
    if isinstance(module, nn.Embedding):
        return [EMBEDDING]
    if isinstance(module, nn.MultiheadAttention):
        names = [f"{name}_proj_weight" for name in "qkv"]  # which have no bias of their own: they share one
        held = [Matrix("in_proj_weight", "in_proj_bias"), *[Matrix(name, None) for name in names]]
        return [matrix for matrix in held if matrix.weight in tensors]
    if is_transposed_linear(type(module)):
        return [TRANSPOSED]
    return list(_experts(module, tensors))


def is_transposed_linear(kind: type) -> bool:
    """Whether it is transformers' Conv1D, or a class of it."""
    return any((c.__module__, c.__name__) == CONV1D for c in kind.__mro__)


# Classes of transformers whose forward is nn.Linear's function in other words.
_LINEAR_ELSEWHERE = {CONV1D, ("transformers.models.falcon.modeling_falcon", "FalconLinear")}


def has_linear_forward(base: type[nn.Module]) -> bool:
    """Whether calling a module of this class is `x W^T + b` by nn.Linear's own forward, or by one known to equal it."""
    owner = next(c for c in base.__mro__ if "forward" in vars(c))
    same = vars(owner)["forward"] is vars(nn.Linear)["forward"]
    return same or (owner.__module__, owner.__name__) in _LINEAR_ELSEWHERE


def has_embedding_forward(base: type[nn.Module]) -> bool:
    """Whether calling a module of this class looks rows up by nn.Embedding's own forward."""
    return issubclass(base, nn.Embedding) and base.forward is nn.Embedding.forward


def has_convolution_forward(base: type[nn.Module]) -> bool:
    """Whether calling a module of this class is `_conv_forward` with its weight and bias, as torch has it."""
    names, kinds = ("forward", "_conv_forward"), (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(issubclass(base, kind) and all(getattr(base, n) is getattr(kind, n) for n in names) for kind in kinds)


# Note [Fused experts]
# transformers and others hold the weights of all experts of a layer in one parameter, `(experts, out, in)` (Mixtral,
# Qwen-MoE) or `(experts, in, out)` (GptOss, Llama4). They are told by the parameters' names and their three axes, and
# the order of the axes by the module's `is_transposed`, or where it does not say, by the sizes: gate and up together
# have twice the outputs that down has inputs. Where that is not enough to tell, they are left to `register_matrix`.
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def _experts(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Matrix]:
    held = {name: tensors[name] for name in _EXPERTS if name in tensors and tensors[name].ndim == 3}
    transposed = _is_transposed(module, {name: tuple(tensor.shape) for name, tensor in held.items()})
    if transposed is None:
        return
    for name, tensor in held.items():
        outputs = tensor.shape[2 if transposed else 1]
        bias = f"{name}_bias"
        fits = bias in tensors and tensors[bias].shape == (tensor.shape[0], outputs)
        yield Matrix(name, bias if fits else None, "e i o -> e o i" if transposed else "e o i -> e o i")


def _is_transposed(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Whether the experts' axes are `e i o`; None where nothing tells."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    inward = shapes.get("gate_up_proj") or shapes.get("up_proj") or shapes.get("gate_proj")
    down = shapes.get("down_proj")
    if inward is None or down is None:
        return None
    factor = 2 if "gate_up_proj" in shapes else 1
    straight = inward[1] == factor * down[2] and inward[2] == down[1]
    transposed = inward[2] == factor * down[1] and inward[1] == down[2]
    return None if straight == transposed else transposed
