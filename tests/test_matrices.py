"""How modules hold their matrices: reading one, writing it back, its path, and what `register_matrix` teaches."""

from __future__ import annotations

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from glora.matrices import Matrix, matrices_of, parse_matrix
from tests.helpers.kinds import KINDS, Kind
from tests.helpers.state import same_outputs, unchanged


class Mixer(nn.Module):
    """A module of the user's own, with an axis for heads."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 3, 4))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,hoi->bho", x, self.kernel).flatten(1) + self.shift


def test_a_kind_that_is_registered_is_reached_by_name_and_its_file_needs_no_registration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from glora import matrices

    monkeypatch.setattr(matrices, "_registered", [])
    with pytest.raises(ValueError, match=r"'kernel' matches none that can be adapted, only Mixer .*register_matrix"):
        glora.apply(Mixer(), ["kernel"], config=glora.GLoRAConfig.glora())
    glora.register_matrix(Mixer, {"kernel": "shift"}, "h o i -> (h o) i")
    model = glora.apply(Mixer(), ["kernel"], GLoRAConfig.glora(init="random"))
    assert glora.state_dict(model)["kernel.A.left"].shape == (6, 8)
    x = torch.randn(5, 4)
    y = model(x)
    with glora.merged(model):
        assert torch.allclose(model(x), y, atol=1e-5)
    glora.save(model, tmp_path)
    monkeypatch.setattr(matrices, "_registered", [])
    base = Mixer()
    base.load_state_dict(glora.base_state_dict(model))
    assert same_outputs(glora.load(base, tmp_path)(x), y)


@pytest.mark.parametrize(
    "pattern",
    [
        *("o i", "o i -> o", "(h o) i -> h o i", "o i -> o i k", "a b c d -> a b c d", "o o -> o o", "o i => o i"),
        *("o i 1 -> o (i 1)", "1 i -> 1 i", "o 2 -> o 2", "_o i -> i _o", "o_ i -> o_ i", "o i -> o i ( )"),
        *("o i ... -> o (i ...)", "o i -> (o) (i) ()", "o i -> o i -> o i", " ", "->", "o é1 i -> o (é1 i) i"),
        f"{' '.join(f'a{i}' for i in range(70))} -> a0 ({' '.join(f'a{i}' for i in range(1, 70))})",
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="A pattern must go from the axes"):
        glora.register_matrix(Mixer, "kernel", pattern)


def test_a_registration_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from glora import matrices

    monkeypatch.setattr(matrices, "_registered", [])
    glora.register_matrix(lambda module: isinstance(module, Mixer), "kernel", "i o -> o i")
    with pytest.raises(ValueError, match=r"its kernel has the shape \(2, 3, 4\), and 'i o -> o i' was registered"):
        glora.apply(Mixer(), ["kernel"], config=glora.GLoRAConfig.glora())
    glora.register_matrix(Mixer, {"kernel": "shift"}, "e o i -> e o i")
    with pytest.raises(ValueError, match="its shift has the shape"):
        glora.apply(Mixer(), ["kernel"], config=glora.GLoRAConfig.glora())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reading_gives_the_matrices_and_writing_gives_the_tensor_back(kind: Kind) -> None:
    module = kind.module(kind.build())
    tensor = getattr(module, kind.weight)
    (matrix,) = [m for m in matrices_of(module, dict(module.named_parameters())) if m.weight == kind.weight]
    read = matrix.read(tensor)
    assert torch.equal(matrix.write(read, tensor), tensor)
    for at in kind.batch(tensor):
        assert torch.equal(read[at], kind.matrix(tensor, at))
    assert (matrix.bias is None) is (kind.bias is None)


@given(
    weight=st.sampled_from(["weight", "kernel", "in_proj_weight"]),
    module=st.lists(st.sampled_from(["a", "0", "kernel", "weight"]), max_size=3).map(".".join),
)
def test_a_path_goes_there_and_back(weight: str, module: str) -> None:
    matrix = Matrix(weight)
    assert matrix.module_path(matrix.path(module)) == module
    assert (matrix.path(module) == module) is (weight == "weight")


@given(st.permutations(["o", "i", "k", "e"]), st.sampled_from(["e o (i k)", "o (e i k)", "(e o) (k i)"]), st.randoms())
def test_any_pattern_that_is_taken_goes_there_and_back(axes: list[str], wanted: str, rng: Random) -> None:
    matrix = parse_matrix("weight", None, f"{' '.join(axes)} -> {wanted}")
    tensor = torch.randn([rng.randint(1, 4) for _ in axes])
    read = matrix.read(tensor)
    assert read.ndim == len(wanted.replace("(", " (").split(" (")[0].split()) + wanted.count("(")
    assert read.numel() == tensor.numel()
    assert torch.equal(matrix.write(read, tensor), tensor)


names = st.lists(st.sampled_from(["o", "i", "1", "2", "_", "a_", "_b", "x1", "é", "...", "()"]), min_size=1, max_size=4)


@given(names, names, st.booleans())
def test_a_pattern_is_taken_only_if_einops_goes_there_and_back(held: list[str], wanted: list[str], group: bool) -> None:
    right = f"{wanted[0]} ({' '.join(wanted[1:])})" if group else " ".join(wanted)
    try:
        matrix = parse_matrix("weight", None, f"{' '.join(held)} -> {right}")
    except ValueError as error:
        assert "A pattern must go" in str(error)  # noqa: PT017 - and nothing else is raised
        return
    tensor = torch.randn([1, 3, 2, 4][: len(held)])
    assert torch.equal(matrix.write(matrix.read(tensor), tensor), tensor)
    assert matrix.read(tensor).ndim in (2, 3)


class Two(nn.Module):
    """Two tensors, that one pattern does not hold for."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, outputs))
        self.experts = nn.Parameter(torch.randn(2, outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + torch.einsum("ni,eoi->no", x, self.experts)


def test_a_later_registration_adds_to_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from glora import matrices

    monkeypatch.setattr(matrices, "_registered", [])
    glora.register_matrix(Two, {"kernel": None}, "i o -> o i")
    glora.register_matrix(lambda module: isinstance(module, Two), {"experts": None}, "e o i -> e o i")
    planned = glora.plan(Two(), ["kernel", "experts"], GLoRAConfig.lora())
    assert [layer.path for layer in planned.layers] == ["kernel", "experts"]
    glora.register_matrix(Two, {"kernel": None}, "o i -> o i")
    patterns = {m.weight: m.pattern for m in matrices_of(Two(), dict(Two().named_parameters()))}
    assert patterns == {"kernel": "o i -> o i", "experts": "e o i -> e o i"}


@pytest.mark.parametrize("outputs", [4, 3])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "second", [GLoRAConfig(A="vector", B="none", C="none", D="none", E="none"), GLoRAConfig.lora()]
)
def test_a_tensor_that_adapters_are_on_takes_no_other_layout(
    outputs: int, copied: bool, second: GLoRAConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from glora import matrices

    monkeypatch.setattr(matrices, "_registered", [])
    glora.register_matrix(Two, {"kernel": None}, "i o -> o i")
    model = glora.apply(Two(outputs), ["kernel"], GLoRAConfig.lora(rank=1, init="random"), name="a")
    model = copy.deepcopy(model) if copied else model
    glora.save(model, tmp_path, "a")
    glora.register_matrix(Two, {"kernel": None}, "o i -> o i")
    x, W = torch.randn(2, 4), model.kernel
    for call in (
        lambda: glora.apply(model, ["kernel"], second, name="b"),
        lambda: glora.plan(model, ["kernel"], second, name="b"),
        lambda: glora.load(model, tmp_path, name="b"),
    ):
        with unchanged(model), pytest.raises(ValueError, match="'i o -> o i'"):
            call()
    assert torch.equal(model.kernel, W)  # it keeps to what was known then
    model(x).sum().backward()
    glora.register_matrix(Two, {"kernel": None}, "i o -> o i")
    glora.apply(model, ["kernel"], second, name="b")
    glora.remove(model)
    glora.register_matrix(Two, {"kernel": None}, "o i -> o i")
    glora.apply(model, ["kernel"], second, name="b")


@pytest.mark.parametrize("kind", [3, int, None, "Two"])
def test_a_kind_that_is_none_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="A kind must be a class of modules, or a predicate"):
        glora.register_matrix(kind, "kernel", "o i -> o i")
    with pytest.raises(ValueError, match="tensors must be a name, or a mapping"):
        glora.register_matrix(Two, ["kernel"], "o i -> o i")  # pyright: ignore
    with pytest.raises(ValueError, match="another tensor than the matrix"):
        glora.register_matrix(Two, {"kernel": "kernel"}, "o i -> o i")


def test_nothing_to_register_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        glora.register_matrix(Mixer, {}, "o i -> o i")
    for weight, bias in (("", "bias"), (3, None), ("kernel", "")):
        with pytest.raises(ValueError, match="names and a pattern"):
            parse_matrix(weight, bias, "o i -> o i")
