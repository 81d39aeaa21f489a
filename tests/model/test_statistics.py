"""What training changes beside parameters is the adapter's (Note [Running statistics])."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora.__main__ import main
from tests.helpers.calls import LORA, attach, quiet, warned
from tests.helpers.state import clones, same, unchanged

X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "without its own weight": lambda: nn.BatchNorm1d(4, affine=False),
    "a mean of all batches": lambda: nn.BatchNorm1d(4, momentum=None),
    "instance norm": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
    "in half precision": lambda: nn.BatchNorm1d(4).bfloat16(),
}
every_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)


class Half(nn.Module):
    """A norm that may be of another dtype than its input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.dtype = norm, norm.running_mean.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.to(self.dtype)).to(x.dtype)


def build(make: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), Half(make()), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2))
    with torch.no_grad():
        model.train()(X)  # statistics of its own
    return model.eval()


def train(model: nn.Module, seed: int, steps: int = 2) -> None:
    model.train()
    for step in range(steps):
        x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(seed + step)) * (seed % 5 + 1)
        model(x).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    model.eval()


@every_norm
@given(seed=st.integers(0, 99), steps=st.integers(0, 3), other=st.booleans(), whole=st.booleans())
def test_trained_statistics_are_the_adapters(
    make: Callable[[], nn.Module],
    seed: int,
    steps: int,
    other: bool,
    whole: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base = build(make)
    y0, plain = base(X), clones(base.state_dict())
    model = attach(copy.deepcopy(base), LORA, targets=["0", "4"], name="a")
    if other:
        attach(model, LORA, targets=["4"], name="b")
        train(model, seed + 1, steps=1)
        glora.activate(model, "a")
        assert torch.equal(model(X), y0), "statistics of another adapter"
    train(model, seed, steps)
    y = model(X)
    norm = model[1].norm
    assert torch.equal(norm.running_mean, plain["1.norm.running_mean"]) is (steps == 0)
    assert same(glora.base_state_dict(model), plain)
    with glora.disabled(model):
        assert torch.equal(model(X), y0)
    with glora.merged(model):
        torch.testing.assert_close(model(X), y)
    folder = tmp_path_factory.mktemp("adapter")
    glora.save(model, folder, "a")
    assert torch.equal(glora.load(copy.deepcopy(base), folder, strict=True)(X), y)
    assert torch.equal(copy.deepcopy(model)(X), y)
    if whole:  # the statistics come back with the tensors
        again = attach(copy.deepcopy(base), LORA, targets=["0", "4"])
        assert torch.equal(glora.load_state_dict(again, glora.state_dict(model, "a"))(X), y)
    kept = copy.deepcopy(model)
    with quiet():
        glora.merge(kept)
    torch.testing.assert_close(kept(X), y)
    assert list(kept.state_dict()) == list(plain)
    assert kept[1].norm.running_mean.equal(norm.running_mean)
    glora.remove(model)
    assert torch.equal(model(X), y0)
    assert same(model.state_dict(), plain)


@every_norm
def test_adapters_act_together_where_their_statistics_are_equal(make: Callable[[], nn.Module]) -> None:
    model = attach(attach(build(make), LORA, targets=["0"], name="a"), LORA, targets=["4"], name="b")
    glora.activate(model, {"a": 1.0, "b": 1.0})
    train(glora.activate(model, "a"), 0)
    with unchanged(model), pytest.raises(ValueError, match="Running statistics .* '1.norm.running_mean' differs"):
        glora.activate(model, {"a": 1.0, "b": 1.0})


def test_a_route_takes_each_adapters_statistics_and_trains_none() -> None:
    model = build(NORMS["batch norm"])
    y0 = model(X)
    for seed, name in enumerate("ab"):
        train(attach(model, LORA, targets=["0", "4"], name=name), seed)
    right = {name: glora.activate(model, name)(X) for name in "ab"}
    names = ["a", None, "b", "b", "a", None]
    with glora.route(model, names):
        y = model(X)
        with pytest.raises(RuntimeError, match="Running statistics of several adapters .* '1.norm'"):
            model.train()(X)
    model.eval()
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], (y0 if name is None else right[name])[row])


def test_statistics_of_a_file_from_before_are_the_bases() -> None:
    base = build(NORMS["batch norm"])
    model = attach(copy.deepcopy(base), LORA, targets=["0"])
    before = {key: tensor for key, tensor in glora.state_dict(model).items() if "norm" not in key}
    glora.load_state_dict(model, before)
    assert torch.equal(model(X), base(X))


class Counting(nn.Module):
    """A module that writes into a buffer of its own in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.detach().abs().mean((0, 2))
        return x * self.seen[:, None]


def test_other_buffers_that_training_has_changed_are_named_by_save(tmp_path: Path) -> None:
    model = nn.Sequential(Counting(), nn.Conv1d(3, 2, 1))
    base = copy.deepcopy(model)
    attach(model, LORA, targets=["1"])
    assert not warned(lambda: glora.save(model, tmp_path))
    train(model.eval(), 0, steps=0)
    train(model, 0)
    (said,) = warned(lambda: glora.save(model, tmp_path))
    assert "0.seen" in said
    (said,) = warned(lambda: glora.load(base, tmp_path))
    assert "0.seen" in said
    assert not warned(lambda: glora.save(attach(glora.remove(model), LORA, targets=["1"]), tmp_path))


@every_norm
@pytest.mark.parametrize("trained", [False, True])
def test_statistics_that_no_training_changed_follow_a_plain_checkpoint(
    make: Callable[[], nn.Module], trained: bool
) -> None:
    pretrained, model = build(make), nn.Sequential(nn.Conv1d(3, 4, 1), Half(make()), nn.Tanh(), nn.Flatten())
    model.append(nn.Linear(20, 2))
    attach(model, LORA, targets=["4"])
    if trained:
        train(model, 3, steps=1)
    mean = model[1].norm.running_mean.clone()
    model.load_state_dict(pretrained.state_dict())
    assert torch.equal(model[1].norm.running_mean, mean) is trained
    with glora.disabled(model.eval()):
        assert torch.equal(model(X), pretrained(X))
    if not trained:
        assert torch.equal(model[1].norm.running_mean, pretrained[1].norm.running_mean)


def test_a_norm_that_torch_has_converted_is_named_and_does_not_hinder_removal() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(attach(build(NORMS["batch norm"]), LORA, targets=["4"]))
    with pytest.warns(UserWarning, match="replaced by another.*running_mean"):
        glora.remove(model)
    assert type(model[4]) is nn.Linear


def test_an_offline_merge_has_the_statistics(tmp_path: Path) -> None:
    model = build(NORMS["batch norm"])
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    train(attach(model, LORA, targets=["4"]), 0)
    glora.save(model, tmp_path / "a")
    files = [str(tmp_path / name) for name in ("base.safetensors", "a", "out.safetensors")]
    assert main(["merge", *files]) == 0
    assert same(load_file(files[-1]), glora.merge(model).state_dict())
