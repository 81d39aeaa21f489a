"""PEFT's methods whose update is of a low rank, made of other tensors than two factors: read as B."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from glora.config import GLoRAConfig
from glora.interop.base import site_at
from glora.interop.low_rank import Pair, elementwise, kronecker, whole, within
from glora.interop.patterns import of_pattern
from glora.interop.peft.methods import Given, Read
from glora.precision import wide
from glora.spec import LayerSpec


def _as_shift(left: Tensor, right: Tensor, scale: float = 1.0) -> Read:
    """An update `scale * left @ right` as B."""
    left, right = within(wide(left) * scale, wide(right))
    return LayerSpec(GLoRAConfig.lora(rank=left.shape[1]), len(left), right.shape[1]), {
        "B.left": left,
        "B.right": right,
    }


def _sizes(given: Given, out_features: int | None = None, in_features: int | None = None) -> tuple[int, int]:
    """The base weight's rows and columns, which the file's must be: before anything of that size is made."""
    shape = tuple(site_at(given.base, given.path).weight.shape)
    described = out_features, in_features
    if len(shape) != 2 or any(d not in (None, size) for d, size in zip(described, shape, strict=True)):
        raise ValueError(f"{given.path!r} has a weight of {shape} where {described} is adapted")
    return shape


def _check_rank(given: Given, rank: int, most: int | None = None) -> None:
    """Raise where a rank is beyond all that a layer of its size can have use for, before tensors of it are made."""
    most = 1024 + 4 * max(_sizes(given)) if most is None else most
    if not 1 <= rank <= most:
        raise ValueError(f"{given.path!r} has rank {rank} on a weight of {_sizes(given)}")


def _check_shape(given: Given, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise where a tensor is not of its shape: others would be multiplied out to sizes that no file has."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{given.path!r} has a {key} of {tuple(tensor.shape)} where {shape} should be")


def _scale(given: Given, alpha: str) -> float:
    """alpha / r, each by the layer's pattern."""
    rank = of_pattern(given.config.get("rank_pattern"), given.path, given.config["r"])
    return of_pattern(given.config.get("alpha_pattern"), given.path, given.config[alpha]) / rank


def read_adalora(given: Given, theirs: dict[str, Tensor]) -> Read | None:
    r"""AdaLoRA (arXiv 2303.10512): $\Delta = \alpha / r_0 \; B (E \odot A)$, with the rank $r_0$ that it began with."""
    A, B, E = theirs.pop("lora_A"), theirs.pop("lora_B"), theirs.pop("lora_E")
    _check_shape(given, "lora_E", E, (len(A), 1))
    if not len(E):  # its budget has left this layer none
        return None
    alpha = given.config["lora_alpha"]
    scale = (alpha if alpha > 0 else len(E)) / (float(given.config["init_r"]) + 1e-5)
    return _as_shift(B.flatten(1), wide(A).flatten(1) * E, scale)


def read_loha(given: Given, theirs: dict[str, Tensor]) -> Read:
    r"""LoHa (arXiv 2108.06098): $\Delta = s (a_1 b_1) \odot (a_2 b_2)$, of rank r^2."""
    pairs = [_decomposed(given, theirs, f"hada_{which}", f"hada_t{which[1]}") for which in ("w1", "w2")]
    for left, right in pairs:
        _sizes(given, len(left), right.shape[1])
    return _as_shift(*elementwise(*pairs), _scale(given, "alpha"))


def _decomposed(given: Given, theirs: dict[str, Tensor], name: str, core_name: str) -> Pair:
    """`a @ b`, or the decomposition of a kernel `a^T (core b)`, with the kernel's axes behind those of the inputs."""
    a, b, core = wide(theirs.pop(f"{name}_a")), wide(theirs.pop(f"{name}_b")), theirs.pop(core_name, None)
    _check_rank(given, a.shape[1 if core is None else 0])
    if core is None:
        return a, b
    if tuple(core.shape[:2]) != (len(a), len(b)):
        raise ValueError(f"{given.path!r} has a core of {tuple(core.shape)} between {len(a)} and {len(b)} components")
    if b.shape[1] * math.prod(core.shape[2:]) > _sizes(given)[1]:
        raise ValueError(f"{given.path!r} has {b.shape[1]} inputs with a kernel of {tuple(core.shape[2:])}")
    return a.mT, torch.einsum("i j k l, j r -> i r k l", wide(core), b).flatten(1)


def read_lokr(given: Given, theirs: dict[str, Tensor]) -> Read:
    r"""LoKr (arXiv 2212.10650): $\Delta = s \; w_1 \otimes w_2$, each whole or decomposed."""
    scale, kernel = _scale(given, "alpha"), theirs.get("lokr_w2")
    one, other = (_factor(given, theirs, which) for which in ("w1", "w2"))
    _sizes(given, len(one[0]) * len(other[0]), one[1].shape[1] * other[1].shape[1])
    if kernel is not None and kernel.ndim == 3:
        # A Conv1d's: PEFT multiplies the axes of w1 into the last two of w2, and not into its first two.
        product = torch.kron(one[0] @ one[1], wide(kernel))
        return _as_shift(*whole(product.reshape(len(one[0]) * len(other[0]), -1)), scale)
    return _as_shift(*kronecker(one, other), scale)


def _factor(given: Given, theirs: dict[str, Tensor], which: str) -> Pair:
    matrix = theirs.pop(f"lokr_{which}", None)
    if matrix is not None:
        return whole(wide(matrix).flatten(1))
    return within(*_decomposed(given, theirs, f"lokr_{which}", f"lokr_t{which[1]}"))


def read_miss(given: Given, theirs: dict[str, Tensor]) -> Read:
    """MiSS (arXiv 2409.15371): each block of r inputs adds the same matrix, so right is the identity, repeated."""
    block = theirs.pop("miss_block")
    if given.config.get("init_weights") == "bat":
        raise ValueError(f"{given.path!r} multiplies blocks of W0 by matrices of their own, which no path does")
    out_features, in_features = _sizes(given)
    _check_rank(given, len(block), in_features)
    if given.config.get("init_weights") == "mini":
        block = block.repeat(1, out_features // block.shape[1])
    rank = len(block)
    right = torch.eye(rank).repeat(1, math.ceil(in_features / rank))[:, :in_features]
    return _as_shift(block.mT, right)


def read_vera(given: Given, theirs: dict[str, Tensor]) -> Read:
    r"""VeRA (arXiv 2310.11454): $\Delta = \Lambda_b B \Lambda_d A$, with A and B shared by all layers."""
    b, d = wide(theirs.pop("vera_lambda_b")), wide(theirs.pop("vera_lambda_d"))
    out_features, in_features = _sizes(given, len(b))
    _check_rank(given, len(d))
    _check_shape(given, "vera_lambda_b", b, (len(b),))
    _check_shape(given, "vera_lambda_d", d, (len(d),))
    right, left = (given.shared.get(f"vera_{name}") for name in "AB")
    if left is None or right is None:
        rows, columns = _largest(given)
        generator = torch.Generator().manual_seed(given.config["projection_prng_key"])
        right = _kaiming((len(d), columns), columns, generator)
        left = _kaiming((rows, len(d)), len(d), generator)
    if len(right) != len(d) or right.shape[1] < in_features or len(left) < out_features or left.shape[1] != len(d):
        raise ValueError(f"{given.path!r} needs larger projections than {tuple(right.shape)} and {tuple(left.shape)}")
    return _as_shift(b.unsqueeze(1) * wide(left)[:out_features], d.unsqueeze(1) * wide(right)[:, :in_features])


def _largest(given: Given) -> tuple[int, int]:
    """The most rows and the most columns that any adapted weight has."""
    shapes = [tuple(site_at(given.base, path).weight.shape) for path in given.paths]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def _kaiming(shape: tuple[int, ...], fan: int, generator: torch.Generator) -> Tensor:
    """As PEFT draws a projection: uniform, with the gain of a ReLU."""
    bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(fan)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def read_vblora(given: Given, theirs: dict[str, Tensor]) -> Read:
    """VB-LoRA (arXiv 2405.15179): both factors are mixtures of vectors from a bank that all layers share."""
    bank = wide(given.shared["vblora_vector_bank"])
    right = _mixed(given, theirs, "vblora_logits_A", bank, 1)  # (r, in / length, length)
    left = _mixed(given, theirs, "vblora_logits_B", bank, 0)  # (out / length, r, length)
    return _as_shift(left.transpose(1, 2).flatten(0, 1), right.flatten(1))


def _mixed(given: Given, theirs: dict[str, Tensor], key: str, bank: Tensor, axis: int) -> Tensor:
    """The mixtures of a factor, whose axis `axis` is that of the weight's, in pieces of the vectors' length."""
    indices = theirs.pop(f"{key}_topk_indices", None)
    shape = (theirs[key] if indices is None else indices).shape
    _check_rank(given, shape[1 - axis])
    if shape[axis] * bank.shape[1] != _sizes(given)[axis]:
        raise ValueError(f"{given.path!r} has {shape[axis]} vectors of {bank.shape[1]} for a weight of {_sizes(given)}")
    if indices is None:
        logits, indices = wide(theirs.pop(key)).topk(given.config["topk"], dim=-1)
        weights = logits.softmax(-1)
    else:
        weights = wide(theirs.pop(f"{key}_topk_weights"))  # all but the last, since they add up to 1
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    _check_shape(given, f"{key} of weights", weights, tuple(indices.shape))
    mixed = embedding_bag(indices.long().flatten(0, 1), bank, per_sample_weights=weights.flatten(0, 1), mode="sum")
    return mixed.reshape(*shape[:2], -1)  # no vector is repeated for each that it is mixed into


def read_randlora(given: Given, theirs: dict[str, Tensor]) -> Read:
    """RandLoRA (arXiv 2502.00987): a sum of scaled random matrices, shared by all layers; of W0's own rank."""
    scales, gamma = wide(theirs.pop("randlora_lambda")), wide(theirs.pop("randlora_gamma"))
    shape = _sizes(given)
    small, large = min(shape), max(shape)
    _check_rank(given, len(scales))
    one, other = (theirs.pop(f"randlora_{name}", given.shared.get(f"randlora_{name}")) for name in "AB")
    if one is None or other is None:
        one, other = _random_bases(given, len(scales))
    bases, ends = scales.shape[1], (one.shape[2], len(other))
    _check_shape(given, "randlora_lambda", scales, (len(scales), math.ceil(small / len(scales))))
    if scales.shape[0] != len(one) or gamma.shape != (bases, small) or ends[0] < small or ends[1] < large:
        raise ValueError(f"{given.path!r} does not go with bases of {tuple(one.shape)} and {tuple(other.shape)}")
    scaled = (scales.unsqueeze(2) * wide(one)[:, :bases, :small] * gamma).flatten(0, 1)  # (r bases, small)
    shared = wide(other)[:large, :bases].flatten(1)  # (large, bases r), as PEFT has them
    left, right = (shared, scaled) if small == shape[1] else (scaled.mT, shared.mT)
    return _as_shift(left, right, given.config["randlora_alpha"] / given.config["r"])


def _random_bases(given: Given, rank: int) -> Pair:
    """RandLoRA's bases from their seed, as PEFT draws them: `(r, 1, small)` and `(large, bases, r)`."""
    sizes = _largest(given)
    small, large = min(sizes), max(sizes)
    bases = math.ceil(small / rank)
    generator = torch.Generator().manual_seed(given.config["projection_prng_key"])
    if not (given.config.get("sparse") or given.config.get("very_sparse")):
        one, *others = (
            torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), math.sqrt(5), generator=generator)
            for shape in ((rank, 1, small), *[(large, 1, rank)] * bases)
        )  # in bfloat16, as PEFT does where a machine has it
        other = torch.cat(others, 1)
    else:
        share = 1 / (2 * (math.sqrt(small) if given.config.get("very_sparse") else 3))
        one = _signs(torch.rand((rank, 1, small), generator=generator), share)
        other = _signs(torch.rand((large, bases, rank), generator=generator), share)
    return one / one.std(), other / other.std()


def _signs(drawn: Tensor, share: float) -> Tensor:
    """-1 for the smallest share of [0, 1], 1 for the largest, 0 between."""
    return (drawn > 1 - share).float() - (drawn < share).float()
