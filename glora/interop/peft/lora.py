"""An adapter as PEFT's LoRA, exactly, or by the nearest of some rank (Note [What a LoRA can be])."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora.functional import weight_update
from glora.interop.base import Base, bias_at, site_at, weight_at
from glora.interop.peft.methods import refuse_unlike_convolution
from glora.matrices import EMBEDDING, Matrix
from glora.precision import multiply, wide
from glora.spec import AdapterSpec, LayerSpec, join
from glora.text import format_problems

# Note [What a LoRA can be]
# PEFT's LoRA is W0 + (alpha / r) lora_B lora_A, and with `lora_bias` a vector (alpha / r) lora_B.bias on the output.
# - B low rank is that as it stands, tensors and alpha. A vector or constant B is of rank one.
# - A of a matrix product is W0 L R: the factors (W0 L) and R, computed beside the base.
# - C, D and E move the output by b0 D + E + W0 C: one vector, the lora_bias.
# - An elementwise A, or a vector that scales inputs, has the rank of W0: no LoRA, but `nearest` gives the best of a
#   rank, by the singular vectors of the whole update.
# PEFT names the factors by the kind of the layer: linear layers and Conv1D as they are, `(r, in, *kernel)` and
# `(out, r, 1, ...)` for convolutions, `lora_embedding_A` and `_B`, both transposed, for embeddings; anything else is a
# parameter of `target_parameters`, whose experts lie side by side in one matrix (Note [PEFT's experts]).


class Written(NamedTuple):
    """An adapter as one of PEFT's methods has it.

    Attributes:
        config: the method's fields of PEFT's config.
        tensors: key without PEFT's prefix to tensor.
        errors: path to the relative error of its update; 0.0 where it is the same to rounding.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    errors: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Update:
    """A layer's update of a low rank: `alpha / rank * left @ right`, and what is added to its output.

    Attributes:
        left: `(..., out, r)`.
        right: `(..., r, in)`.
        alpha: the scale times the rank.
        shift: `(out,)`; None where no path moves the bias.
        error: relative, of the update of the weight.
    """

    left: Tensor
    right: Tensor
    alpha: float
    shift: Tensor | None = None
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return self.left.shape[-1]


def exact_update(path: str, layer: LayerSpec, tensors: Mapping[str, Tensor], base: Base) -> Update:
    """A layer's update, where it is of a low rank by its forms.

    Args:
        path: the layer's.
        layer: its forms.
        tensors: the adapter's, by their keys.
        base: the model; needed for what multiplies the base weight.

    Raises:
        ValueError: it is of the rank of the base weight, or that is needed and not there.
    """
    config, scaling = layer.config, layer.config.scaling
    pairs: list[tuple[Tensor, Tensor]] = []
    if config.A == "lora" and config.product == "matmul":
        left = multiply(weight_at(base, path), tensors[join(path, "A.left")].cpu())
        pairs.append((left * scaling, tensors[join(path, "A.right")]))
    elif config.A != "none":
        kind = "a constant" if config.A == "constant" else "of a matrix product" if config.product == "matmul" else ""
        raise ValueError(f"{path!r} has A={config.A} ({kind or 'elementwise'}), an update of W0's own rank")
    shift = shift_of(path, layer, tensors, base)
    if config.B == "lora":
        left, right = tensors[join(path, "B.left")], tensors[join(path, "B.right")]
        if not pairs:
            return Update(left, right, float(config.rank if config.alpha is None else config.alpha), shift)
        pairs.append((wide(left) * scaling, right))
    elif config.B != "none":
        column = _column(path, layer, tensors[join(path, "B.value")])
        pairs.append((column, column.new_ones(*column.shape[:-2], 1, _size(path, layer.in_features))))
    if not pairs:
        sizes = *(layer.batch or ()), _size(path, layer.out_features), _size(path, layer.in_features)
        pairs.append((torch.zeros(*sizes[:-1], 1), torch.zeros(*sizes[:-2], 1, sizes[-1])))
    left = torch.cat([wide(left).cpu() for left, _ in pairs], -1)
    right = torch.cat([wide(right).cpu() for _, right in pairs], -2)
    return Update(left, right, float(left.shape[-1]), shift)


def _column(path: str, layer: LayerSpec, value: Tensor) -> Tensor:
    """A vector or constant as one number for each output, `(..., out, 1)`."""
    batch = layer.batch or ()
    return wide(value).reshape(*batch, -1, 1).expand(*batch, _size(path, layer.out_features), 1)


def _size(path: str, size: int | None) -> int:
    if size is None:
        raise ValueError(f"the size of {path!r} is not known: give the base model")
    return size


def shift_of(path: str, layer: LayerSpec, tensors: Mapping[str, Tensor], base: Base) -> Tensor | None:
    """What a layer's paths C, D and E add to its output, `b0 D + E + W0 C`; None where it has none of them.

    Raises:
        ValueError: the base is needed for C or D, and not there.
    """
    config = layer.config
    if all(config.forms[name] == "none" for name in "CDE"):
        return None
    total = torch.zeros(*(layer.batch or ()), _size(path, layer.out_features))
    if config.E != "none":
        total = total + wide(tensors[join(path, "E.value")]).cpu()
    if config.D != "none" and layer.bias is not False:
        bias = bias_at(base, path)
        total = total if bias is None else total + bias * wide(tensors[join(path, "D.value")]).cpu()
    if config.C == "lora":
        C = multiply(tensors[join(path, "C.left")] * config.scaling, tensors[join(path, "C.right")]).cpu()
        total = total + multiply(weight_at(base, path), C).squeeze(-1)
    elif config.C == "vector":
        total = total + multiply(weight_at(base, path), tensors[join(path, "C.value")].cpu()).squeeze(-1)
    return total


def whole_update(path: str, layer: LayerSpec, tensors: Mapping[str, Tensor], base: Base) -> Tensor:
    """W' - W0 of a layer, `(..., out, in)`, in float32 at least."""
    W0, paths = weight_at(base, path), dict[str, Any]()
    for name in "AB":
        form = layer.config.forms[name]
        if form == "lora":
            left, right = (tensors[join(path, f"{name}.{factor}")].cpu() for factor in ("left", "right"))
            paths[name] = wide(left) * layer.config.scaling, right
        elif form != "none":
            paths[name] = wide(tensors[join(path, f"{name}.value")]).cpu()
    update = weight_update(W0, **paths, product=layer.config.product)
    return torch.zeros_like(W0) if update is None else update.expand_as(W0)


def nearest_update(path: str, layer: LayerSpec, tensors: Mapping[str, Tensor], base: Base, rank: int) -> Update:
    """The update of a rank, or less, that is nearest to a layer's: the truncated singular value decomposition."""
    try:
        exact = exact_update(path, layer, tensors, base)
    except ValueError:
        exact = None
    if exact is not None and exact.rank <= rank:
        return exact
    update = whole_update(path, layer, tensors, base)
    linalg: Any = torch.linalg
    svd: tuple[Tensor, Tensor, Tensor] = linalg.svd(update, full_matrices=False)
    U, S, Vh = svd
    kept = min(rank, S.shape[-1])
    root = S[..., :kept].sqrt()
    total = float(S.square().sum().sqrt())
    error = float(S[..., kept:].square().sum().sqrt()) / total if total else 0.0
    left, right = U[..., :kept] * root.unsqueeze(-2), root.unsqueeze(-1) * Vh[..., :kept, :]
    return Update(left, right, float(kept), shift_of(path, layer, tensors, base), error)


def write_lora(adapter: AdapterSpec, base: Base, rank: int | None = None) -> Written:
    """An adapter as PEFT's LoRA: exactly, or with `rank` the nearest of that rank where it is none.

    Raises:
        ValueError: it is none.
    """
    problems: list[str] = []
    updates: dict[str, Update] = {}
    for path, layer in adapter.layers.items():
        try:
            if rank is None:
                updates[path] = exact_update(path, layer, adapter.tensors, base)
            else:
                updates[path] = nearest_update(path, layer, adapter.tensors, base, rank)
        except ValueError as error:  # noqa: PERF203 - all are named
            problems.append(str(error))
    if problems:
        raise ValueError(format_problems(problems))
    return lora_of(adapter, base, updates)


def lora_of(adapter: AdapterSpec, base: Base, updates: Mapping[str, Update]) -> Written:
    """These updates as PEFT's LoRA."""
    has_bias = any(update.shift is not None for update in updates.values())
    named, problems = _Named(base), list[str]()
    for path, update in updates.items():
        try:
            named.add(path, adapter.layers[path], update, has_bias)
        except ValueError as error:  # noqa: PERF203 - all are named
            problems.append(str(error))
    if named.transposed and named.parameters:
        problems.append("it has Conv1D layers beside parameters of their own, which PEFT's config cannot say together")
    if problems:
        raise ValueError(format_problems(problems))
    r, patterns = _pattern({path: update.rank for path, update in updates.items()})
    alpha, alphas = _pattern({path: _number(update.alpha) for path, update in updates.items()})
    config = {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": patterns,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "lora_bias": has_bias,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": named.transposed and not named.straight,
        "target_modules": target_modules(named.modules, base),
        "target_parameters": named.parameters or None,
    }
    return Written(config, named.finish(), {path: update.error for path, update in updates.items()})


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and those of the other paths, as PEFT's patterns: regexes of whole paths."""
    common = Counter(values.values()).most_common(1)[0][0] if values else 8
    return common, {f"^{re.escape(path)}": value for path, value in values.items() if value != common}


def target_modules(paths: list[str], base: Base) -> list[str] | str:
    """PEFT's `target_modules` for these modules and no other.

    A list of suffixes where that says it, which is what servers read (SGLang no other): last components, or whole
    paths. A regex of the whole paths otherwise. Without the model, whole paths: where another module's path ends in
    one, PEFT gives it a LoRA of its own start, which does nothing.
    """
    if base.model is None:
        return sorted(set(paths))
    for names in ([path.rpartition(".")[2] for path in paths], paths):
        suffixes = sorted(set(names))
        reached = {p for p in base.owners if any(p == s or p.endswith(f".{s}") for s in suffixes)}
        if reached == set(paths):
            return suffixes
    return "|".join(re.escape(path) for path in paths)


class _Named:
    """Factors under PEFT's names, by the kind of each layer."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.tensors: dict[str, Tensor] = {}
        self.modules: list[str] = []
        self.parameters: list[str] = []
        self.transposed = self.straight = False
        self.wrapped: dict[str, list[tuple[str, Tensor, Tensor]]] = {}  # module path to parameters and factors

    def add(self, path: str, layer: LayerSpec, update: Update, has_bias: bool) -> None:
        matrix = layer.matrix or Matrix()
        left, right = update.left, update.right
        if not path:
            raise ValueError("it is on the model itself, and PEFT adapts layers inside of a model")
        if matrix.weight != "weight" or layer.batch:
            if has_bias:
                raise ValueError(f"{path!r} is a parameter of target_parameters, beside which PEFT has no lora_bias")
            module = matrix.module_path(path)
            self.parameters.append(path)
            self.wrapped.setdefault(module, []).append((matrix.weight, *self._experts(path, matrix, left, right)))
            return
        self.modules.append(path)
        if matrix == EMBEDDING:
            if has_bias:
                raise ValueError(f"{path!r} is an embedding, beside which PEFT has no lora_bias")
            self.tensors |= {f"{path}.lora_embedding_A": left.mT, f"{path}.lora_embedding_B": right.mT}
            return
        kernel = len(matrix.axes) - 2
        if kernel:
            site = site_at(self.base, path)
            refuse_unlike_convolution(path, site.module)
            left, right = (
                left.reshape(*left.shape, *[1] * kernel),
                right.reshape(-1, *site.owner.tensors["weight"].shape[1:]),
            )
        self.transposed |= not matrix.is_plain and not kernel
        self.straight |= matrix.is_plain or bool(kernel)
        self.tensors |= {f"{path}.lora_A.weight": right, f"{path}.lora_B.weight": left}
        if has_bias:
            scale = update.alpha / update.rank
            shift = torch.zeros(left.shape[0]) if update.shift is None else update.shift
            self.tensors[f"{path}.lora_B.bias"] = shift / scale

    def _experts(self, path: str, matrix: Matrix, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of a parameter (Note [PEFT's experts])."""
        module: Any = site_at(self.base, path).module
        axes = matrix.axes
        if len(axes) not in (2, 3) or (len(axes) == 3) != (left.ndim == 3):
            raise ValueError(f"{path!r} is held as {matrix.pattern!r}, which target_parameters does not know")
        P, Q = (left, right) if matrix.is_plain else (right.mT, left.mT)
        if len(axes) == 2:
            return Q, P
        A, B = (P.mT, Q.mT) if getattr(module, "is_transposed", False) else (Q, P)
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)

    def finish(self) -> dict[str, Tensor]:
        """All tensors by their keys."""
        for module, parameters in self.wrapped.items():
            order = list(self.base.owners[module].module._parameters)
            parameters.sort(key=lambda held: order.index(held[0]), reverse=True)
            for depth, (_, A, B) in enumerate(parameters):
                at = module + ".base_layer" * depth
                self.tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
        return self.tensors
