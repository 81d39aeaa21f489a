"""`model.load_state_dict` while adapters are there: of a plain checkpoint, and of the model's own state dict."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import glora
from glora import GLoRAConfig
from tests.helpers.calls import attach
from tests.helpers.models import TOKENS, Model, attached, build
from tests.helpers.state import all_adapters, clones, identities, other_values, same, same_outputs
from tests.helpers.strategies import configs


def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without running statistics: those that nothing has trained follow the base's."""
    is_head = "norm.weight" in tensors
    return {key: tensor for key, tensor in tensors.items() if is_head or not key.startswith("norm.")}


def remove_one(model: Model, tensor: str | None) -> None:
    """Torch's removal of one tensor's parametrization, where there is one."""
    if tensor is not None and parametrize.is_parametrized(model.first, tensor):
        parametrize.remove_parametrizations(model.first, tensor)


@attached
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("without", [None, "weight", "bias"], ids=["whole", "weight removed", "bias removed"])
@pytest.mark.parametrize("kind", [OrderedDict, dict], ids=["with metadata", "bare dict"])
def test_a_plain_checkpoint_loads_strictly_and_the_adapters_stay(
    how: Callable[[nn.Module], object], assign: bool, without: str | None, kind: type[dict[str, Tensor]]
) -> None:
    model = build()
    checkpoint = model.state_dict()
    # A checkpoint as torch saves it carries versions in `_metadata`; one from safetensors is a bare dict.
    given = kind(other_values(checkpoint))
    if kind is OrderedDict:
        given._metadata = checkpoint._metadata  # type: ignore[attr-defined]
    W0 = model.first.weight.detach().clone()
    how(model)
    attached_tensors = all_adapters(model)
    remove_one(model, without)
    adapters, ids, weights = all_adapters(model), identities(model), glora.adapters(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    keys = list(given)

    assert model.load_state_dict(given, strict=True, assign=assign) == ([], [])

    assert list(given) == keys
    assert same(glora.base_state_dict(model), dict(given))
    assert identities(model) == ids
    after = all_adapters(model)
    assert after.keys() == adapters.keys()
    assert all(same(trained(after[name]), trained(adapters[name])) for name in adapters)
    assert glora.adapters(model) == weights
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags

    # It computes what a model computes that loaded these values before its adapters were attached.
    fresh = build()
    fresh.load_state_dict(given)
    if any(key.endswith("C.shift") for key, _ in model.named_buffers()):  # a frozen W0 C stays what it was
        fresh.load_state_dict({"first.weight": W0}, strict=False)
    how(fresh)
    for name, tensors in attached_tensors.items():
        glora.load_state_dict(fresh, trained(tensors), name)
    if without != "weight":
        assert torch.equal(model.first.weight, fresh.first.weight)
    if without != "bias":
        assert torch.equal(model.first.bias, fresh.first.bias)
    if without is None:
        assert same_outputs(model(TOKENS), fresh(TOKENS))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_plain_checkpoint_older_than_a_counter_leaves_the_bases_counter(assign: bool) -> None:
    # Files without versions may lack `num_batches_tracked`. BatchNorm then inserts the module's own value, which for a
    # head is the adapter's.
    model = build()
    given = other_values(model.state_dict())
    del given["norm.num_batches_tracked"]
    attach(model, targets=["first"], trainable=["norm"])
    model.train()(TOKENS)
    assert model.load_state_dict(given, strict=True, assign=assign) == ([], [])
    assert glora.base_state_dict(model)["norm.num_batches_tracked"].item() == 0
    assert glora.state_dict(model)["norm.num_batches_tracked"].item() == 1


@attached
def test_a_wrapped_model_loads_a_plain_checkpoint_too(how: Callable[[nn.Module], object]) -> None:
    model = AveragedModel(build())
    given = other_values(model.state_dict())
    how(model)
    adapters = all_adapters(model)
    assert model.load_state_dict(given, strict=True) == ([], [])
    plain = {key.removeprefix("module."): tensor for key, tensor in given.items() if key != "n_averaged"}
    assert same(glora.base_state_dict(model), plain)
    assert all(same(trained(all_adapters(model)[name]), trained(adapters[name])) for name in adapters)


def test_layers_are_given_plain_or_adapter_keys_each_on_its_own() -> None:
    model = build()
    plain = {key: tensor for key, tensor in other_values(model.state_dict()).items() if key.startswith("first.")}
    attach(model)
    kept = {key: tensor for key, tensor in clones(glora.state_dict(model)).items() if key.startswith("first.")}
    given = {key: tensor for key, tensor in other_values(model.state_dict()).items() if not key.startswith("first.")}
    assert model.load_state_dict(given | plain, strict=True) == ([], [])
    now = glora.state_dict(model)
    assert same({key: tensor for key, tensor in now.items() if key.startswith("first.")}, kept)
    assert same({key: glora.base_state_dict(model)[key] for key in plain}, plain)
    assert torch.equal(now["head.E.value"], given["head.parametrizations.bias.0.default.E.value"])


def test_a_strict_load_of_a_plain_checkpoint_is_still_strict() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model)
    for key in ("first.weight", "first.bias", "second.weight", "norm.weight"):
        module, _, tensor = key.partition(".")
        with pytest.raises(RuntimeError, match=rf"Missing key.*{module}.*{tensor}"):
            model.load_state_dict({name: value for name, value in plain.items() if name != key})
    for key in ("first.gain", "second.bias", "elsewhere"):
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}"):
            model.load_state_dict(plain | {key: torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"size mismatch.*first"):
        model.load_state_dict(plain | {"first.weight": torch.zeros(6, 5)})


def test_a_plain_load_that_is_not_strict_writes_what_it_is_given() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model)
    new = torch.randn(6, 4)
    model.load_state_dict({"first.weight": new}, strict=False)
    assert same(glora.base_state_dict(model), plain | {"first.weight": new})


# model.state_dict() keeps torch's keys.


@attached
@pytest.mark.parametrize("without", [None, "weight", "bias"], ids=["whole", "weight removed", "bias removed"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("kind", [OrderedDict, dict], ids=["with metadata", "bare dict"])
def test_a_models_state_dict_goes_into_an_identically_adapted_model(
    how: Callable[[nn.Module], object], without: str | None, assign: bool, kind: type[dict[str, Tensor]]
) -> None:
    source, target = build(), build()
    for model in (source, target):
        how(model)
        remove_one(model, without)
    assert not all(torch.equal(tensor, target.state_dict()[key]) for key, tensor in source.state_dict().items())
    given = copy.deepcopy(source.state_dict())
    assert target.load_state_dict(given if kind is OrderedDict else dict(given), strict=True, assign=assign) == ([], [])
    assert same(target.state_dict(), source.state_dict())
    assert same(glora.base_state_dict(target), glora.base_state_dict(source))
    assert same_outputs(target(TOKENS), source(TOKENS))


@given(config=configs(needs="ABCDE"))
def test_a_models_state_dict_goes_round_for_every_config(config: GLoRAConfig) -> None:
    source, target = build(), build()
    for model in (source, target):
        attach(model, config)
    target.load_state_dict(source.state_dict(), strict=True)
    assert same_outputs(target(TOKENS), source(TOKENS))


def test_a_models_state_dict_has_the_keys_of_parametrize() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=GLoRAConfig.lora(rank=1))
    assert set(layer.state_dict()) == {
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0.default.B.left",
        "parametrizations.weight.0.default.B.right",
    }
