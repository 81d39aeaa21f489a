"""How modules hold their matrices: reading one, writing it back, its path, and what `register_matrix` teaches."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from glora.matrices import Matrix, matrices_of, parse_matrix
from tests.helpers.kinds import KINDS, Kind
from tests.helpers.state import same_outputs


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
        glora.apply(Mixer(), ["kernel"])
    glora.register_matrix(Mixer, {"kernel": "shift"}, "h o i -> (h o) i")
    model = glora.apply(Mixer(), ["kernel"], GLoRAConfig(init="random"))
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
    "pattern", ["o i", "o i -> o", "(h o) i -> h o i", "o i -> o i k", "a b c d -> a b c d", "o o -> o o", "o i => o i"]
)
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="A pattern must go from the axes"):
        glora.register_matrix(Mixer, "kernel", pattern)


def test_a_registration_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from glora import matrices

    monkeypatch.setattr(matrices, "_registered", [])
    glora.register_matrix(lambda module: isinstance(module, Mixer), "kernel", "i o -> o i")
    with pytest.raises(ValueError, match=r"its kernel has the shape \(2, 3, 4\), and 'i o -> o i' was registered"):
        glora.apply(Mixer(), ["kernel"])
    glora.register_matrix(Mixer, {"kernel": "shift"}, "e o i -> e o i")
    with pytest.raises(ValueError, match="its shift has the shape"):
        glora.apply(Mixer(), ["kernel"])


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


def test_nothing_to_register_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        glora.register_matrix(Mixer, {}, "o i -> o i")
    for weight, bias in (("", "bias"), (3, None), ("kernel", "")):
        with pytest.raises(ValueError, match="names and a pattern"):
            parse_matrix(weight, bias, "o i -> o i")
