"""A weighted sum of adapters as one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora.arithmetic.low_rank import truncated, widened
from glora.config import FORMS
from glora.fingerprint import alike
from glora.model.adapters import check_weights
from glora.model.attach import attach_spec
from glora.model.state import describe
from glora.model.walk import Model, adapted_owners
from glora.precision import wide
from glora.spec import AdapterSpec, LayerSpec, join
from glora.text import format_names, format_problems, table

# Note [Sums of adapters]
# Every path is linear in what it adds to W0 or b0, so that a sum of adapters is a sum path by path. Of two low ranks it
# is one of both ranks together: the left factors, each times its weight and its alpha / rank, side by side, and the
# right ones below each other. Vectors and constants add up; a vector has room for a constant. Beside a low rank either
# is a component of rank one more, `vector @ ones`.
#
# Under the matrix product a vector A is a diagonal matrix, and a constant one a multiple of the identity: neither is of
# low rank. Nor has a layer two A's, one of each product; a constant A is the same under both.


def combine(model: Model, weights: Mapping[str, float], *, name: str, rank: int | None = None) -> Model:
    r"""Add adapters up into one: a new adapter that computes what `glora.activate(model, weights)` does.

    $$W' = W_0 + \sum_i w_i (W_0 \ast A_i + B_i), \qquad b' = b_0 + \sum_i w_i (b_0 \odot D_i + E_i + W_0 C_i)$$

    Without `rank` it is exact, to rounding: the rank of each layer is the sum of the adapters' (Note [Sums of
    adapters]). With it, every low-rank path is cut to that rank at most by singular values, the nearest that there is,
    and a table of the relative error of each path is printed.

    The new adapter has `alpha=None` (the scales are in its factors) and no rank dropout. It is a copy: the adapters
    that it was made from stay, inactive, and may be deleted.

    Args:
        model: the model.
        weights: adapter's name to weight, as `glora.activate` takes them.
        name: the new adapter's name.
        rank: the largest rank of a path; None for no limit.

    Returns:
        The model; the new adapter is the only active one.

    Raises:
        KeyError: a name that is not an adapter of the model.
        ValueError: a weight that is no finite number, none but 0, or a name that is taken; heads that differ, as for
            `glora.activate`; in one layer an elementwise A and one of the matrix product, or under the matrix product
            a low-rank A and a vector or constant one: no one A is their sum. Nothing has changed then.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Example:
        >>> import torch, glora
        >>> config = glora.GLoRAConfig.lora(rank=2, init="random")
        >>> layer = glora.apply(glora.apply(torch.nn.Linear(4, 6), config=config, name="a"), config=config, name="b")
        >>> x = torch.randn(3, 4)
        >>> both = glora.activate(layer, {"a": 0.7, "b": 0.3})(x)
        >>> layer = glora.combine(layer, {"a": 0.7, "b": 0.3}, name="ab")
        >>> torch.allclose(layer(x), both, atol=1e-5), glora.adapters(layer)
        (True, {'a': 0.0, 'b': 0.0, 'ab': 1.0})
        >>> glora.state_dict(layer, "ab")["B.left"].shape
        torch.Size([6, 4])
    """
    active = check_weights(adapted_owners(model), weights)
    # It is the same base: no fingerprint need be compared.
    parts = [(weights[a], replace(describe(model, a), base={}, outside={})) for a in active]
    spec, errors = combined(parts, rank)
    attach_spec(model, spec, f"the sum of {', '.join(map(repr, active))}", name=name)
    if rank is not None:
        print(error_table(f"adapter {name!r}: low-rank paths, cut to rank {rank}", errors))
    return model


def combine_files(
    adapters: Sequence[tuple[float, AdapterSpec]], rank: int | None
) -> tuple[AdapterSpec, dict[str, float]]:
    """`combined` of adapters of which no model says that they agree: their bases and heads must be the same.

    Raises:
        ValueError: as `combined`; frozen tensors or heads that differ, by name.
    """
    active = [adapter for weight, adapter in adapters if weight != 0]
    for adapter in active[1:]:
        first = active[0]
        both = adapter.base.keys() & first.base.keys()
        apart = [key for key in both if not alike(adapter.base[key], first.base[key], _COUNT)]
        if apart:
            raise ValueError(
                f"Adapters of one base add up; these were trained beside tensors that differ in "
                f"{format_names(sorted(apart))}."
            )
        keys = [set(each.copies()) for each in (first, adapter)]
        differing = keys[0] ^ keys[1] | {k for k in keys[0] & keys[1] if not _equal(first, adapter, k)}
        if differing:
            raise ValueError(
                f"Heads do not add up: all must have equal ones, and equal running statistics, and "
                f"{format_names(sorted(differing))} differ. Add up adapters without a trainable= head."
            )
    return combined([(weight, adapter) for weight, adapter in adapters if weight != 0], rank)


_COUNT = 2**20  # numbers of a tensor, where a file does not say: it matters for tensors of almost only zeros


def _equal(first: AdapterSpec, other: AdapterSpec, key: str) -> bool:
    one, two = first.tensors[key], other.tensors[key]
    return one.shape == two.shape and torch.equal(wide(one), wide(two)) if one.is_floating_point() else one.equal(two)


class _Part(NamedTuple):
    """One adapter's share in a layer: its weight, the layer, and the layer's tensors by their keys within it."""

    weight: float
    layer: LayerSpec
    tensors: dict[str, Tensor]

    def path(self, name: str) -> Tensor | tuple[Tensor, Tensor]:
        """A path that is not none, times weight and scale."""
        if self.layer.config.forms[name] == "lora":
            left, right = self.tensors[f"{name}.left"], self.tensors[f"{name}.right"]
            return wide(left) * (self.weight * self.layer.config.scaling), wide(right)
        return wide(self.tensors[f"{name}.value"]) * self.weight


def combined(
    adapters: Sequence[tuple[float, AdapterSpec]], rank: int | None = None
) -> tuple[AdapterSpec, dict[str, float]]:
    """The weighted sum of described adapters, and the relative error of each low-rank path (Note [Sums of adapters]).

    Heads are taken from the first that has them: the caller has seen to it that they agree.

    Raises:
        ValueError: no adapter; a rank below 1; a layer whose A's have no sum of one form; descriptions that differ in
            a layer's shape; tensors on the meta device.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"rank must be an int of at least 1, or None for no limit; found {rank!r}.")
    if not adapters:
        raise ValueError("A sum needs an adapter whose weight is not 0; found none.")
    if any(tensor.is_meta for _, adapter in adapters for tensor in adapter.tensors.values()):
        raise ValueError("Adapters must have memory to be added up; found tensors on the meta device.")
    parts: dict[str, list[_Part]] = {}
    adapters = [(weight, adapter.folded()) for weight, adapter in adapters]
    for weight, adapter in adapters:
        for path, layer in adapter.layers.items():
            tensors = {key: adapter.tensors[join(path, key)] for key in _held(path, layer, adapter)}
            parts.setdefault(path, []).append(_Part(weight, layer, tensors))
    problems = [f"{path!r}: {reason}" for path, some in parts.items() if (reason := _why_not(some)) is not None]
    if problems:
        raise ValueError(
            f"A sum of adapters must have one A in each layer, of one form and product; found "
            f"{format_problems(problems)}. glora.activate with these weights runs them together, and glora.merge bakes "
            f"them in."
        )
    layers, tensors, errors = dict[str, LayerSpec](), dict[str, Tensor](), dict[str, float]()
    for path, some in parts.items():
        layers[path], own, cut = _sum(some, rank)
        tensors |= {join(path, key): tensor for key, tensor in own.items()}
        errors |= {join(path, key): error for key, error in cut.items()}
    sources = [adapter for _, adapter in reversed(adapters)]  # where several have a key, the first counts
    heads = dict(item for adapter in sources for item in adapter.heads.items())
    statistics = dict(item for adapter in sources for item in adapter.statistics.items())
    ties = dict(item for adapter in sources for item in adapter.ties.items())
    base = dict(item for adapter in sources for item in adapter.base.items())
    for adapter in sources:
        tensors |= {key: adapter.tensors[key] for key in adapter.copies()}
    changed = {*base, *tensors, *ties}
    outside = {k: known for adapter in sources for k, known in adapter.outside.items() if k not in changed}
    return AdapterSpec(layers, heads, tensors, ties, base, outside, statistics), errors


_SHAPE = ("out_features", "in_features", "bias", "batch", "matrix")


def _held(path: str, layer: LayerSpec, adapter: AdapterSpec) -> list[str]:
    """Keys within a layer; a D that may be left out (LayerSpec.bias) is not, as long as it is there."""
    return [key for key in layer.tensors() if join(path, key) in adapter.tensors]


def _why_not(parts: Sequence[_Part]) -> str | None:
    """Why a layer's shares cannot be added up."""
    configs = [part.layer.config for part in parts]
    products = sorted({config.product for config in configs if config.A in ("lora", "vector")})
    if len(products) > 1:
        return f"A of both products, {' and '.join(products)}"
    forms = list(dict.fromkeys(config.A for config in configs if config.A != "none"))
    if products == ["matmul"] and "lora" in forms and len(forms) > 1:
        return f"A of the matrix product in the forms {' and '.join(forms)}"
    for field in _SHAPE:
        found = dict.fromkeys(getattr(part.layer, field) for part in parts)
        known = [value for value in found if value is not None]
        if len(known) > 1:
            return f"{field} {' and '.join(map(str, known))}"
    return None


def _sum(parts: Sequence[_Part], rank: int | None) -> tuple[LayerSpec, dict[str, Tensor], dict[str, float]]:
    """A layer of the sum: its description, its tensors, and the relative errors of its low-rank paths."""
    forms: dict[str, Any] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    tensors, errors = dict[str, Tensor](), dict[str, float]()
    for name in FORMS:
        shares = [part for part in parts if any(key.startswith(f"{name}.") for key in part.tensors)]
        if not shares:
            forms[name] = "none"
            continue
        total = _add([part.path(name) for part in shares])
        if isinstance(total, Tensor):
            forms[name] = "vector" if any(p.layer.config.forms[name] == "vector" for p in shares) else "constant"
            tensors[f"{name}.value"] = total
        else:
            forms[name] = "lora"
            left, right, errors[name] = (*total, 0.0) if rank is None else truncated(*total, rank)
            pairs[name] = left, right
    configs = [part.layer.config for part in parts]
    first = next((config for config in configs if config.A in ("lora", "vector")), configs[0])
    widest = max((left.shape[-1] for left, _ in pairs.values()), default=first.rank)
    for name, pair in pairs.items():
        tensors[f"{name}.left"], tensors[f"{name}.right"] = widened(*pair, widest)
    created = any(config.create_bias for config in configs)
    config = replace(first, **forms, rank=widest, alpha=None, balance="none", rank_dropout=0.0, create_bias=created)
    layer = replace(parts[0].layer, config=config)
    for field in _SHAPE:  # what one source does not say, another may
        known = [value for part in parts if (value := getattr(part.layer, field)) is not None]
        layer = replace(layer, **{field: known[0] if known else None})
    return layer, tensors, errors


def _add(terms: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor | tuple[Tensor, Tensor]:
    """A path's sum (Note [Sums of adapters])."""
    pairs = [term for term in terms if not isinstance(term, Tensor)]
    values = [term for term in terms if isinstance(term, Tensor)]
    if values and pairs:
        left, right = pairs[0]
        ones = right.new_ones(*right.shape[:-2], 1, right.shape[-1])
        pairs.append((sum(values[1:], values[0]).expand(*left.shape[:-1], 1), ones))
    if not pairs:
        return sum(values[1:], values[0])
    return torch.cat([left for left, _ in pairs], -1), torch.cat([right for _, right in pairs], -2)


def error_table(title: str, errors: Mapping[str, float]) -> str:
    """Relative errors as a table."""
    return table(title, ["path", "relative error"], [[key, f"{error:.3g}"] for key, error in errors.items()])
