"""Adapters as kohya and LyCORIS have them: LoRA and LoCon, with DoRA too, GLoRA and IA3 (Note [LyCORIS's methods])."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from glora.config import GLoRAConfig
from glora.files.container import replace_files
from glora.fingerprint import Fingerprint
from glora.interop.base import Base, weight_at
from glora.interop.lycoris.methods import GLORA, norms, padded
from glora.interop.lycoris.names import flat, front
from glora.interop.tensors import tensor_file
from glora.matrices import LINEAR, convolution
from glora.precision import multiply, wide, working_dtype
from glora.spec import AdapterSpec, LayerSpec, join
from glora.text import format_problems


def write_lycoris(
    file: Path, adapters: Mapping[str, AdapterSpec], bases: Mapping[str, Base] | None = None, *, rs_lora: bool = False
) -> None:
    """Write the adapters of one or several models into one file.

    Args:
        file: the file.
        adapters: prefix of the names to adapter.
        bases: prefix to the model; convolutions cannot be written without it.
        rs_lora: write the alpha of GLoRA for a network that is made with `rs_lora`.

    Raises:
        ValueError: the format cannot hold one of them; nothing is written.
    """
    problems: list[str] = []
    names: set[str] = set()
    tensors: dict[str, Tensor] = {}
    base: dict[str, Fingerprint] = {}
    for prefix, balanced in adapters.items():
        adapter = balanced.folded()
        problems += [f"{path!r} is a head" for path in adapter.heads]
        known = (bases or {}).get(prefix, Base())
        for path, layer in adapter.layers.items():
            name = front(prefix) + flat(path)
            if name in names:
                problems.append(f"two layers have the one name {name!r} there")
            names.add(name)
            factors = {key: adapter.tensors[join(path, key)] for key in layer.tensors() if key[0] in "AB"}
            try:
                parts = _parts(path, layer, factors, known, rs_lora)
            except ValueError as error:
                problems.append(str(error))
            else:
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        several = "" if len(adapters) == 1 else f"{prefix}/"
        base |= {several + key: fingerprint for key, fingerprint in adapter.base.items()}
    if problems:
        raise ValueError(
            f"LyCORIS's files have B low rank, alone or beside a low-rank A of a matrix product or a vector A, or a "
            f"vector A alone, on linear layers and convolutions; this adapter cannot be written for it, and nothing "
            f"was. Found: {format_problems(problems)}. Keep it with glora.save."
        )
    replace_files({file: tensor_file(tensors, base)})


def _parts(path: str, layer: LayerSpec, factors: Mapping[str, Tensor], base: Base, rs_lora: bool) -> dict[str, Tensor]:
    """A layer's tensors in the file.

    Raises:
        ValueError: it cannot be written.
    """
    config = layer.config
    unheld = [f"{n}={config.forms[n]}" for n in "CDE" if config.forms[n] != "none"]
    if not path:
        raise ValueError("it is on the model itself")
    if unheld:
        raise ValueError(f"{path!r} has {' '.join(unheld)}")
    shape = _shape(path, layer, base)
    if math.prod(shape[2:]) > 1 and any(factor.is_meta for factor in factors.values()):
        raise ValueError(f"{path!r} is on the meta device")
    if config.A == "vector" and config.B == "none":
        return _ia3(path, factors["A.value"], shape, on_input=config.product == "matmul")
    if config.A == "vector" and config.B == "lora":
        return _dora(path, config, factors, shape, base)
    problems = [f"{n}={config.forms[n]}" for n in "AB" if config.forms[n] not in ("lora", "none")]
    problems += [f"product={config.product!r}"] if config.A == "lora" and config.product != "matmul" else []
    if problems:
        raise ValueError(f"{path!r} has {' '.join(problems)}")
    alpha = config.scaling * config.rank
    if config.A == "none":
        return _lora(factors["B.left"], factors["B.right"], alpha, shape)
    rows, columns, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
    a1, a2 = factors["A.left"], factors["A.right"]
    dtype = working_dtype(a1)
    b1 = factors.get("B.left", torch.zeros(rows, config.rank, dtype=dtype))
    b2 = factors.get("B.right", torch.zeros(config.rank, columns, dtype=dtype))
    if kernel > 1:
        mixing = _mixing(a1, a2, b1, b2, kernel)
        if mixing is None:  # beside the base it is W0 L R
            W0 = weight_at(base, path).to(a1.device)
            left, right = torch.cat([multiply(W0, a1), wide(b1)], 1), torch.cat([wide(a2), wide(b2)])
            return _lora(left, right, config.scaling * len(right), shape)
        a1, a2, b1, b2 = mixing
    rank = a1.shape[1]
    alpha = config.scaling * (math.sqrt(rank) if rs_lora else rank)
    ones = (1,) * len(shape[2:])
    inner = {"A.left": (*a1.shape, *ones), "A.right": (*a2.shape, *ones), "B.left": (*b1.shape, *ones)}
    shapes = {**inner, "B.right": (rank, *shape[1:])}
    held = dict(zip(GLORA, (a1, a2, b1, b2), strict=True))
    written = {GLORA[key]: tensor.reshape(shapes[key]) for key, tensor in held.items()}
    return written | {"alpha": torch.tensor(alpha, dtype=dtype)}


def _shape(path: str, layer: LayerSpec, base: Base) -> tuple[int, ...]:
    """The shape of the weight as a linear layer or a convolution holds it."""
    rows, columns = layer.out_features, layer.in_features
    if layer.is_linear and rows is not None and columns is not None:
        return rows, columns
    site = base.sites.get(path)
    if base.model is None or layer.matrix is None:
        raise ValueError(f"{path!r} is no linear layer of a known shape, and is written from its model alone")
    if site is None or layer.matrix.pattern not in [LINEAR.pattern, *[convolution(axes).pattern for axes in (1, 2, 3)]]:
        raise ValueError(f"{path!r} is no linear layer, and no convolution")
    if layer.matrix.weight != "weight":
        raise ValueError(f"{path!r} is no module's weight")
    return tuple(site.owner.tensors["weight"].shape)


def _lora(left: Tensor, right: Tensor, alpha: float, shape: tuple[int, ...]) -> dict[str, Tensor]:
    ones = (1,) * len(shape[2:])
    return {
        "lora_up.weight": left.reshape(*left.shape, *ones),
        "lora_down.weight": right.reshape(len(right), *shape[1:]),
        "alpha": torch.tensor(alpha, dtype=working_dtype(left)),
    }


def _dora(
    path: str, config: GLoRAConfig, factors: Mapping[str, Tensor], shape: tuple[int, ...], base: Base
) -> dict[str, Tensor]:
    """g W0 + B as g (W0 + B / g), with the norms of that in brackets times g as magnitudes."""
    by_rows, kernel = config.product == "hadamard", math.prod(shape[2:])
    value, left, right = (wide(factors[key]).cpu() for key in ("A.value", "B.left", "B.right"))
    g = 1 + value
    if not bool(g.all()):
        raise ValueError(f"{path!r} has A=vector with a -1, so that W0 is lost there")
    left, right = (left * config.scaling / g, right) if by_rows else (left * config.scaling, right / g)
    channels = g.flatten() if by_rows else _by_channel(path, g, kernel)
    magnitude = channels * norms(weight_at(base, path) + multiply(left, right), by_rows, kernel)
    own = (-1, 1, *(1,) * len(shape[2:])) if by_rows else (1, -1, *(1,) * len(shape[2:]))
    return _lora(left, right, len(right), shape) | {"dora_scale": magnitude.to(left.dtype).reshape(own)}


def _by_channel(path: str, value: Tensor, kernel: int) -> Tensor:
    """One number an input channel, of one a column."""
    by_channel = value.reshape(-1, kernel)
    if not torch.equal(by_channel, by_channel[:, :1].expand_as(by_channel)):
        raise ValueError(f"{path!r} scales the places of a kernel apart")
    return by_channel[:, 0]


def _ia3(path: str, value: Tensor, shape: tuple[int, ...], *, on_input: bool) -> dict[str, Tensor]:
    value = _by_channel(path, value, math.prod(shape[2:])) if on_input else value.flatten()
    if shape[2:]:
        value = value.reshape(1, -1, *(1,) * len(shape[2:]))
    return {"weight": value, "on_input": torch.tensor(int(on_input))}


def _mixing(
    a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """GLoRA's factors of a convolution (Note [LyCORIS's GLoRA]); None where A does more than mix the channels."""
    one, other, eye = a1[::kernel, ::kernel], a2[::kernel, ::kernel], torch.eye(kernel).to(a1)
    if a1.shape[1] % kernel or not (torch.equal(a1, torch.kron(one, eye)) and torch.equal(a2, torch.kron(other, eye))):
        return None
    rank = one.shape[1]
    used = (b1.abs().sum(0) * b2.abs().sum(1)).nonzero()
    rank = max(rank, int(used.max()) + 1 if len(used) else 0)
    return *padded(one, other, rank), b1[:, :rank], b2[:rank]
