"""How far an adapter moves its base: the norms of its paths, and of the change of each weight and bias."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from glora import functional
from glora.spec import AdapterSpec, LayerSpec, join

Factored: TypeAlias = Tensor | tuple[Tensor, Tensor]

_BLOCK = 2**22  # entries of a weight that stand in memory as float64


class Norms(NamedTuple):
    """Frobenius norms of one layer.

    Attributes:
        weight: of W' - W0.
        bias: of b' - b0.
        of_weight: of W0.
    """

    weight: float
    bias: float
    of_weight: float


def paths_of(adapter: AdapterSpec, path: str, layer: LayerSpec) -> dict[str, Factored]:
    """The paths of a layer as `glora.functional` takes them, in float64 and scaled."""
    tensors = {
        key: adapter.tensors[join(path, key)].double() for key in layer.tensors() if join(path, key) in adapter.tensors
    }
    paths: dict[str, Factored] = {}
    for name in layer.config.paths:
        if f"{name}.left" in tensors:
            scale = layer.config.scaling * tensors.get(f"{name}.balance", 1)
            paths[name] = tensors[f"{name}.left"] * scale, tensors[f"{name}.right"]
        elif f"{name}.value" in tensors:
            paths[name] = tensors[f"{name}.value"]
    return paths


def path_norms(adapter: AdapterSpec, path: str, layer: LayerSpec) -> dict[str, float]:
    """The norm of each path of a layer as a whole matrix or vector, without making it.

    That of B is the norm of its change of the weight, of E of the bias; A, C and D multiply W0 or b0.

    Example:
        >>> import torch, glora
        >>> layer = LayerSpec(glora.GLoRAConfig.lora(rank=1, alpha=2), 3, 4)
        >>> tensors = {"B.left": torch.ones(3, 1), "B.right": torch.ones(1, 4)}
        >>> path_norms(AdapterSpec({"": layer}, {}, tensors), "", layer)["B"]  # 2 sqrt(12)
        6.928203230275509
    """
    o, i, config = layer.out_features, layer.in_features, layer.config
    norms: dict[str, float] = {}
    for name, tensors in paths_of(adapter, path, layer).items():
        if isinstance(tensors, tuple):
            # ||L R||^2 = <L^T L, R R^T>, both (r, r)
            left, right = tensors
            norms[name] = math.sqrt(max(0.0, float(((left.mT @ left) * (right @ right.mT)).sum())))
            continue
        # How often each number stands in the whole: along the axis that it has none of.
        if name in "DE":
            times = o if config.forms[name] == "constant" else 1
        elif name == "C":
            times = 1
        elif name == "A" and config.product == "matmul":
            times = i if config.forms[name] == "constant" else 1
        else:
            times = i if config.forms[name] == "vector" else None if o is None or i is None else o * i
        norms[name] = math.nan if times is None else float(tensors.square().sum().sqrt()) * math.sqrt(times)
    return norms


@torch.no_grad()
def update_norms(adapter: AdapterSpec, path: str, layer: LayerSpec, W0: Tensor, b0: Tensor | None) -> Norms:
    """The norms of what a layer's paths change; W' is never whole.

    Args:
        adapter: the adapter.
        path: the layer's path in it.
        layer: the layer.
        W0: the frozen weight as a matrix `(out, in)`, or a batch of them.
        b0: the frozen bias `(out,)`, with the batch before it; None where there is none.
    """
    paths, product = paths_of(adapter, path, layer), layer.config.product
    A, B, C, D, E = (paths.get(name) for name in "ABCDE")
    square, square_of_base, prompts = 0.0, 0.0, list[Tensor]()
    step = max(1, _BLOCK * W0.shape[-2] // W0.numel())
    for start in range(0, W0.shape[-2], step):
        rows = slice(start, start + step)
        block = W0[..., rows, :].double()
        own_A = A if product == "matmul" else _cut(A, rows)
        update = functional.weight_update(block, own_A, _cut(B, rows), product=product)
        square += 0.0 if update is None else float(update.expand_as(block).square().sum())
        square_of_base += float(block.square().sum())
        if C is not None:
            prompts.append(functional.prompted(block, C))
    frozen = torch.zeros(W0.shape[:-1], dtype=torch.float64) if b0 is None else b0.double()
    prompt = torch.cat(prompts, -1) if prompts else None
    shift = functional.bias_update(frozen, prompt, cast("Tensor | None", D), cast("Tensor | None", E))
    of_bias = 0.0 if shift is None else float(shift.expand_as(frozen).square().sum().sqrt())
    return Norms(math.sqrt(square), of_bias, math.sqrt(square_of_base))


def _cut(path: Factored | None, rows: slice) -> Factored | None:
    """The part of a path that meets these rows of the weight; a constant meets all."""
    if isinstance(path, tuple):
        return path[0][..., rows, :], path[1]
    return path if path is None or path.ndim == 1 or path.shape[-2] == 1 else path[..., rows, :]
