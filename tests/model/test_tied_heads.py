"""A head that is tied to other modules trains as one copy, which all of them read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora.__main__ import main
from tests.helpers.calls import RANDOM, attach, quiet, refused, remove_with_torch, warned
from tests.helpers.state import same, same_outputs, unchanged

TOKENS = torch.tensor([[1, 4, 2], [0, 5, 3]])


class Tied(nn.Module):
    """A language model's shape: an embedding, a layer, and an output layer on the embedding's weight."""

    def __init__(self, bias: bool = True, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.middle, self.out = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=bias)
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.embed(tokens))))


def made(bias: bool = True) -> Tied:
    torch.manual_seed(0)
    return Tied(bias)


def moved(model: nn.Module, name: str | None = None, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in glora.parameters(model, name):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(trainable: Any, bias: bool = True, **options: Any) -> Any:
    return moved(attach(made(bias), targets=["middle"], trainable=trainable, **options), options.get("name"))


HEADS: list[tuple[list[str], list[str]]] = [
    (["embed"], ["embed.weight"]),
    (["out"], ["out.weight", "out.bias"]),
    (["embed", "out"], ["embed.weight", "out.bias"]),
]
NAMES = ["embedding", "output", "both"]
heads_and_keys = pytest.mark.parametrize(("trainable", "keys"), HEADS, ids=NAMES)
heads = pytest.mark.parametrize("trainable", [trainable for trainable, _ in HEADS], ids=NAMES)


@heads_and_keys
def test_there_is_one_copy_and_both_read_it(trainable: list[str], keys: list[str]) -> None:
    model = adapted(trainable)
    assert model.embed.weight is model.out.weight
    assert [key for key in glora.state_dict(model) if not key.startswith("middle")] == keys
    parameters = list(glora.parameters(model))
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    own = 24 + (6 if "out.bias" in keys else 0)
    base = made()
    planned = glora.plan(base, ["middle"], RANDOM, trainable=trainable)
    assert sum(head.parameters for head in planned.heads) == own
    optimizer = torch.optim.SGD(parameters, 0.5)
    model(TOKENS).square().sum().backward()
    reference = made()
    reference.load_state_dict({key: tensor for key, tensor in glora.state_dict(model).items() if key in keys}, False)
    reference.out.weight = reference.embed.weight = nn.Parameter(model.embed.weight.detach().clone())
    with torch.no_grad():
        reference.middle.weight.copy_(model.middle.weight)
        reference.middle.bias.copy_(model.middle.bias)
    reference(TOKENS).square().sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, reference.embed.weight.grad)
    before = model.out.weight.detach().clone()
    optimizer.step()
    assert model.embed.weight is model.out.weight
    assert not torch.equal(model.out.weight, before)


@heads
@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
def test_the_tie_is_there_again_after_merge_and_remove(trainable: list[str], finish: Callable[[Any], Any]) -> None:
    model = made()
    weight, before = model.embed.weight, copy.deepcopy(model.state_dict())
    moved(attach(model, targets=["middle"], trainable=trainable))
    y = model(TOKENS)
    copied = model.embed.weight.detach().clone()
    finish(model)
    assert model.embed.weight is model.out.weight is weight
    assert weight.requires_grad
    if finish is glora.remove:
        assert same(model.state_dict(), before)
    else:
        assert torch.equal(weight, copied)
        torch.testing.assert_close(model(TOKENS), y)
    assert list(model.state_dict()) == list(before)


@heads
def test_merged_disabled_and_copies(trainable: list[str]) -> None:
    base = made()(TOKENS)
    model = adapted(trainable)
    y = model(TOKENS)
    with glora.disabled(model):
        assert torch.equal(model(TOKENS), base)
        assert model.embed.weight is model.out.weight
    with glora.merged(model):
        torch.testing.assert_close(model(TOKENS), y)
        assert model.embed.weight.data_ptr() == model.out.weight.data_ptr()
    assert torch.equal(model(TOKENS), y)
    replica = copy.deepcopy(model)
    moved(replica, seed=5)
    assert replica.embed.weight is replica.out.weight
    assert torch.equal(model(TOKENS), y)
    assert not torch.equal(replica(TOKENS), y)
    halved = copy.deepcopy(model).double()
    assert halved.embed.weight is halved.out.weight
    assert halved.out.weight.dtype == torch.float64


@heads
def test_two_adapters_each_have_theirs_and_samples_are_routed(trainable: list[str]) -> None:
    model = adapted(trainable, name="a")
    attach(model, targets=["middle"], trainable=["embed"], name="b")
    moved(model, "b", seed=2)
    outputs: dict[str | None, Tensor] = {}
    for name in ("a", "b"):
        glora.activate(model, name)
        assert model.embed.weight is model.out.weight
        assert model.embed.weight.requires_grad
        outputs[name] = model(TOKENS)
    with glora.disabled(model):
        outputs[None] = model(TOKENS)
    for names in (["a", "b"], ["b", None], [None, "a"]):
        with glora.route(model, names):
            y = model(TOKENS)
        for row, name in enumerate(names):
            torch.testing.assert_close(y[row], outputs[name][row])
    glora.delete(model, "a")
    glora.activate(model, "b")
    assert torch.equal(model(TOKENS), outputs["b"])
    both = adapted(trainable, name="a")
    moved(attach(both, targets=["middle"], trainable=["embed"], name="b"), "b", seed=2)
    with pytest.raises(ValueError, match="Heads do not add up"):
        glora.activate(both, {"a": 1.0, "b": 1.0})


@heads_and_keys
def test_what_is_saved_comes_back(trainable: list[str], keys: list[str], tmp_path: Path) -> None:
    model = adapted(trainable)
    glora.save(model, tmp_path)
    saved = [key for key in load_file(tmp_path / "adapter_model.safetensors") if not key.startswith("middle")]
    assert sorted(saved) == sorted(keys)
    other = glora.load(made(), tmp_path, strict=True)
    assert same_outputs(other(TOKENS), model(TOKENS))
    assert other.embed.weight is other.out.weight
    glora.load_state_dict(other, glora.state_dict(moved(model, seed=9)))
    assert same_outputs(other(TOKENS), model(TOKENS))
    glora.reset_parameters(other)
    assert torch.equal(other.out.weight, made().out.weight)


@heads
def test_a_model_that_is_not_tied_does_not_take_it_nor_the_reverse(trainable: list[str], tmp_path: Path) -> None:
    glora.save(adapted(trainable), tmp_path / "tied")
    torch.manual_seed(0)
    loose = Tied(tie=False)
    with unchanged(loose), pytest.raises(glora.AdapterFileError, match="is not tied to"):
        glora.load(loose, tmp_path / "tied")
    glora.save(attach(loose, targets=["middle"], trainable=["embed"]), tmp_path / "loose")
    model = made()
    with unchanged(model), pytest.raises(glora.AdapterFileError, match="tied to the head 'embed' here alone"):
        glora.load(model, tmp_path / "loose")


@heads
@pytest.mark.parametrize("both", [True, False], ids=["twice in the checkpoint", "once"])
def test_a_checkpoint_is_merged_in_all_places(trainable: list[str], both: bool, tmp_path: Path) -> None:
    model = adapted(trainable)
    glora.save(model, tmp_path / "adapter")
    base = {key: tensor.clone() for key, tensor in made().state_dict().items()}
    if not both:
        del base["embed.weight" if trainable == ["out"] else "out.weight"]
    save_file(base, tmp_path / "base.safetensors")
    with quiet():
        code = main(["merge", *(str(tmp_path / name) for name in ("base.safetensors", "adapter", "out.safetensors"))])
    assert code == 0
    found, wanted = load_file(tmp_path / "out.safetensors"), glora.merge(model).state_dict()
    assert found.keys() == base.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_on_the_meta_device_both_get_the_one_copys_memory(tmp_path: Path) -> None:
    glora.save(model := adapted(["embed"]), tmp_path)
    with torch.device("meta"):
        bare = Tied()
    attach(bare, targets=["middle"], trainable=["embed"])
    bare.to_empty(device="cpu")
    glora.load_state_dict(bare, glora.state_dict(model))
    assert bare.embed.weight is bare.out.weight
    assert torch.equal(bare.out.weight, model.out.weight)


def test_a_swept_layer_that_reads_the_copy_is_left_out_with_no_warning() -> None:
    model = made()
    assert warned(lambda: glora.apply(model, "all-linear", RANDOM, trainable=["embed"])) == []
    assert "tied to what trains as a whole" in str(glora.plan(made(), "all-linear", RANDOM, trainable=["embed"]))
    assert not any(key.startswith("out") for key in glora.state_dict(model))
    assert "tied" in str(glora.summary(model))


def test_what_reads_the_copy_must_be_fit_for_it() -> None:
    model = made()
    nn.utils.parametrizations.weight_norm(model.middle)
    model.middle.register_parameter("tied", model.embed.weight)
    refused(
        model,
        "'embed' is not: its copy is middle.tied's too, and there: it is parametrized",
        ["out"],
        trainable=["embed"],
    )


def test_a_head_that_torchs_removal_took_from_under_a_tie_is_not_saved(tmp_path: Path) -> None:
    model = adapted(["embed"])
    remove_with_torch(model.embed, "weight")
    with pytest.raises(RuntimeError, match=r"the head that 'out\.weight' is tied to"):
        glora.save(model, tmp_path)


def test_a_file_says_what_is_tied(tmp_path: Path) -> None:
    glora.save(adapted(["embed"]), tmp_path)
    assert json.loads((tmp_path / "glora_config.json").read_text())["ties"] == {"out.weight": "embed.weight"}
