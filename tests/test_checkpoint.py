"""State dicts: the keys of adapters, loading all or nothing, and the model's own keys, which survive."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import glora
from glora import GLoRAConfig
from tests.test_targets import snapshot, unchanged

FORMS = {
    "A": ["lora", "vector", "constant", "none"],
    "B": ["lora", "vector", "constant", "none"],
    "C": ["lora", "vector", "none"],
    "D": ["vector", "constant", "none"],
    "E": ["vector", "constant", "none"],
}
RANDOM = GLoRAConfig(rank=2, init="random")


class Scaled(nn.Linear):
    """A linear layer with a parameter and a buffer of its own behind weight and bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 3, bias=False)
        self.third = Scaled(3, 3)
        self.head = nn.Linear(3, 2)
        self.embed.weight.requires_grad_(False)
        self.third.scale.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.second(torch.tanh(self.norm(self.first(self.embed(tokens)))))
        return self.head(torch.tanh(self.third(x)))


def build() -> Model:
    """A model in eval mode whose norm is no identity."""
    model = Model().eval()
    with torch.no_grad():
        for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
            assert tensor is not None
            tensor.copy_(torch.randn_like(tensor))
    return model


TOKENS = torch.arange(7)


def attach(model: nn.Module, config: GLoRAConfig = RANDOM, **arguments: Any) -> None:
    """`glora.apply` to all linear layers, without its warning of those that have no bias."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        glora.apply(model, config=config, **arguments)


def two(model: nn.Module) -> None:
    attach(model, GLoRAConfig.lora(rank=1, init="random"), name="a", trainable=["head"])
    attach(model, RANDOM, name="b", trainable=["head"])


def inactive(model: nn.Module) -> None:
    attach(model)
    glora.activate(model, {})


ATTACH: dict[str, Callable[[nn.Module], None]] = {
    "all paths": attach,
    "weight alone": lambda model: attach(model, GLoRAConfig.lora(rank=2, init="random")),
    "bias alone": lambda model: attach(model, GLoRAConfig(A="none", B="none", init="random")),
    "created bias": lambda model: attach(model, GLoRAConfig(rank=1, init="random", create_bias=True)),
    "heads": lambda model: attach(model, trainable=["norm", "head"]),
    "one layer": lambda model: attach(model, targets=["second"]),
    "two": two,
    "inactive": inactive,
}
attached = pytest.mark.parametrize("how", ATTACH.values(), ids=ATTACH)


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys, in any order, and the same bits."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


def other_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor + 3
        for key, tensor in tensors.items()
    }


def all_adapters(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: clones(glora.state_dict(model, name)) for name in glora.adapters(model)}


def identities(model: nn.Module) -> dict[tuple[str, str], int]:
    return {
        (name, key): id(parameter)
        for name in glora.adapters(model)
        for key, parameter in glora.named_parameters(model, name)
    }


# The keys of an adapter.


def expected_shapes(config: GLoRAConfig, out: int, inp: int) -> dict[str, tuple[int, ...]]:
    """Section 1 of the contract, as a table."""
    r = config.rank
    whole = {"left": (out, r), "right": (r, inp)}
    scales_inputs = {"left": (inp, r), "right": (r, inp)}
    matmul = config.product == "matmul"
    table: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
        "A": {"lora": scales_inputs if matmul else whole, "vector": {"value": (1, inp) if matmul else (out, 1)}},
        "B": {"lora": whole, "vector": {"value": (out, 1)}},
        "C": {"lora": {"left": (inp, r), "right": (r, 1)}, "vector": {"value": (inp, 1)}},
        "D": {"vector": {"value": (out,)}},
        "E": {"vector": {"value": (out,)}},
    }
    return {
        f"{path}.{factor}": shape
        for path, form in config.forms.items()
        if form != "none"
        for factor, shape in ({"value": (1,)} if form == "constant" else table[path][form]).items()
    }


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_keys_and_shapes_are_those_of_the_contract_for_every_form(product: Any) -> None:
    seen = 0
    for forms in itertools.product(*FORMS.values()):
        if set(forms) == {"none"}:
            continue
        choice: Any = dict(zip(FORMS, forms, strict=True))
        config = GLoRAConfig(**choice, rank=2, product=product)
        layer = glora.apply(nn.Linear(3, 5), config=config)
        wanted = expected_shapes(config, 5, 3)
        assert {key: tuple(tensor.shape) for key, tensor in glora.state_dict(layer).items()} == wanted
        assert {key: tuple(tensor.shape) for key, tensor in glora.named_parameters(layer)} == wanted
        seen += 1
    assert seen == 4 * 4 * 3 * 3 * 3 - 1


def test_keys_begin_with_the_modules_path() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"q_proj": nn.Linear(3, 5)}), "rest": nn.Linear(2, 2)})
    glora.apply(model, ["q_proj"], GLoRAConfig(B="none", C="none", D="constant"))
    assert list(glora.state_dict(model)) == [
        "encoder.q_proj.A.left",
        "encoder.q_proj.A.right",
        "encoder.q_proj.D.value",
        "encoder.q_proj.E.value",
    ]


def test_a_heads_keys_are_its_own_and_hold_its_persistent_buffers() -> None:
    model = build()
    attach(model, targets=["first"], trainable=["norm", "head"])
    assert {key for key in glora.state_dict(model) if key.split(".")[0] in ("norm", "head")} == {
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "head.weight",
        "head.bias",
    }
    assert not any("parametrizations" in key for key in glora.state_dict(model))
    trained = {key for key, _ in glora.named_parameters(model)}
    assert {key for key in trained if key.split(".")[0] in ("norm", "head")} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_factors_have_at_least_single_precision(dtype: torch.dtype, wanted: torch.dtype) -> None:
    layer = glora.apply(nn.Linear(3, 5, dtype=dtype))
    assert {tensor.dtype for tensor in glora.state_dict(layer).values()} == {wanted}


def test_a_state_dict_is_detached_and_shares_the_adapters_memory() -> None:
    layer = glora.apply(nn.Linear(3, 5))
    tensors = glora.state_dict(layer)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    tensors["E.value"].fill_(2.0)
    assert dict(glora.named_parameters(layer))["E.value"].tolist() == [2.0] * 5


CALLS: dict[str, Callable[[nn.Module, str | None], object]] = {
    "state_dict": glora.state_dict,
    "load_state_dict": lambda model, name: glora.load_state_dict(model, {}, name),
    "named_parameters": glora.named_parameters,
    "parameters": glora.parameters,
    "reset_parameters": glora.reset_parameters,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_name_means_the_only_adapter_and_an_unknown_one_is_a_key_error(
    call: Callable[[nn.Module, str | None], object],
) -> None:
    model = build()
    with pytest.raises(ValueError, match="only adapter"):
        call(model, None)
    two(model)
    with unchanged(model):
        with pytest.raises(ValueError, match="only adapter.*'a', 'b'"):
            call(model, None)
        with pytest.raises(KeyError, match=r"'c'.*'a', 'b'"):
            call(model, "c")


# glora.load_state_dict.

CONFIGS = st.builds(
    GLoRAConfig,
    **{path: st.sampled_from(forms) for path, forms in FORMS.items()},  # type: ignore[arg-type]
    rank=st.integers(1, 3),
    alpha=st.sampled_from([None, 1.0, 5.0]),
    product=st.sampled_from(["hadamard", "matmul"]),
    create_bias=st.booleans(),
).filter(lambda config: any(form != "none" for form in config.forms.values()))


@given(config=CONFIGS, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_state_dict_carries_the_adapter_to_another_model(config: GLoRAConfig, dtype: torch.dtype) -> None:
    source = build().to(dtype)
    target = copy.deepcopy(source)
    attach(source, GLoRAConfig(**{**vars(config), "init": "random"}), trainable=["norm"])
    attach(target, config, trainable=["norm"])
    ids, base = identities(target), clones(glora.base_state_dict(target))
    carried = clones(glora.state_dict(source))
    assert glora.load_state_dict(target, carried) is target
    assert same(glora.state_dict(target), carried)
    assert torch.equal(target(TOKENS), source(TOKENS))
    assert identities(target) == ids
    assert same(glora.base_state_dict(target), base)


def test_loading_writes_into_the_named_adapter_alone() -> None:
    model = build()
    two(model)
    other, new = clones(glora.state_dict(model, "b")), other_values(glora.state_dict(model, "a"))
    glora.load_state_dict(model, new, "a")
    assert same(glora.state_dict(model, "a"), new)
    assert same(glora.state_dict(model, "b"), other)
    assert glora.adapters(model) == {"a": 0.0, "b": 1.0}


def test_loading_copies_and_casts_to_the_adapters_dtype() -> None:
    layer = glora.apply(nn.Linear(3, 5))
    new = {key: tensor.double() for key, tensor in other_values(glora.state_dict(layer)).items()}
    glora.load_state_dict(layer, new)
    wanted = {key: tensor.float() for key, tensor in new.items()}
    for tensor in new.values():
        tensor.zero_()
    assert same(glora.state_dict(layer), wanted)


def test_what_is_loaded_is_seen_under_a_cache() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    with parametrize.cached():
        before = layer.weight.clone()
        glora.load_state_dict(layer, {key: 0 * tensor for key, tensor in glora.state_dict(layer).items()})
        assert not torch.equal(layer.weight, before)
        assert torch.equal(layer.weight, layer.parametrizations.weight.original)


def test_one_error_names_every_problem_and_nothing_is_written() -> None:
    model = build()
    attach(model, trainable=["head"])
    given = other_values(glora.state_dict(model))
    del given["first.A.left"], given["head.bias"]
    given["first.A.middle"] = torch.zeros(1)
    given["first.B.left"] = torch.zeros(6, 3)
    given["second.A.right"] = torch.zeros(2, 6, dtype=torch.int64)
    given["head.weight"] = torch.zeros(2, 3, dtype=torch.complex64)
    not_a_tensor: Any = [1.0]
    given["third.E.value"] = not_a_tensor
    with unchanged(model), pytest.raises(ValueError, match="nothing was written") as refusal:
        glora.load_state_dict(model, given)
    message = str(refusal.value)
    for problem in (
        "missing: first.A.left, head.bias",
        "unexpected: first.A.middle",
        "first.B.left: shape (6, 3) where (6, 2) should be",
        "second.A.right: torch.int64 where torch.float32",
        "head.weight: torch.complex64 where torch.float32",
        "third.E.value: a list where a tensor",
    ):
        assert problem in message


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(5, 1),
        torch.zeros(1),  # would broadcast
        torch.zeros(()),
        torch.zeros(5, dtype=torch.int32),
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(5, dtype=torch.complex64),
        torch.zeros(5, device="meta"),  # holds nothing to copy
        torch.zeros(5).to_sparse(),
        None,
    ],
    ids=["column", "broadcast", "scalar", "int", "bool", "complex", "meta", "sparse", "None"],
)
def test_a_tensor_that_cannot_be_written_leaves_the_others_unwritten(value: Any, strict: bool) -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    given = other_values(glora.state_dict(layer)) | {"E.value": value}
    with unchanged(layer), pytest.raises(ValueError, match=r"E\.value"):
        glora.load_state_dict(layer, given, strict=strict)


def test_not_strict_writes_the_keys_that_both_have() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    before = clones(glora.state_dict(layer))
    glora.load_state_dict(layer, {"E.value": torch.ones(5), "elsewhere": torch.ones(1)}, strict=False)
    assert same(glora.state_dict(layer), before | {"E.value": torch.ones(5)})


def test_a_head_trained_elsewhere_comes_with_its_buffers() -> None:
    source = build()
    target = copy.deepcopy(source)
    for model in (source, target):
        attach(model, targets=["first"], trainable=["norm"])
    source.train()(TOKENS)
    source.eval()
    assert glora.state_dict(source)["norm.num_batches_tracked"].item() == 1
    glora.load_state_dict(target, glora.state_dict(source))
    assert torch.equal(target(TOKENS), source(TOKENS))


# The base model's own keys.


@contextmanager
def disabled_inside_merged(model: nn.Module) -> Generator[nn.Module]:
    with glora.merged(model), glora.disabled(model):
        yield model


@contextmanager
def merged_inside_disabled(model: nn.Module) -> Generator[nn.Module]:
    with glora.disabled(model), glora.merged(model):
        yield model


STATES: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "attached": nullcontext,
    "merged": glora.merged,
    "disabled": glora.disabled,
    "disabled inside merged": disabled_inside_merged,
    "merged inside disabled": merged_inside_disabled,
}
in_states = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


@attached
@in_states
@pytest.mark.parametrize(
    "wrap", [lambda model: model, AveragedModel, torch.compile], ids=["bare", "averaged", "compiled"]
)
def test_the_base_state_dict_is_the_plain_models(
    how: Callable[[nn.Module], None],
    state: Callable[[nn.Module], AbstractContextManager[object]],
    wrap: Callable[[nn.Module], Any],
) -> None:
    plain = build()
    model = wrap(copy.deepcopy(plain))
    how(model)
    with state(model):
        assert same(glora.base_state_dict(model), plain.state_dict())
        assert build().load_state_dict(glora.base_state_dict(model), strict=True) == ([], [])
    assert same(glora.base_state_dict(model), plain.state_dict())


def test_the_base_state_dict_of_an_averaged_adapted_model_is_the_plain_models() -> None:
    plain = build()
    model = copy.deepcopy(plain)
    attach(model, trainable=["norm", "head"])
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert same(glora.base_state_dict(averaged), plain.state_dict())
    assert glora.state_dict(averaged).keys() == glora.state_dict(model).keys()


def test_training_leaves_the_base_state_dict_as_it_was() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model, trainable=["norm", "head"])
    optimizer = torch.optim.SGD(glora.parameters(model), lr=0.1)
    before = clones(glora.state_dict(model))
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(TOKENS).square().sum().backward()
        optimizer.step()
    moved = {key for key, tensor in glora.state_dict(model).items() if not torch.equal(tensor, before[key])}
    # Not all: a norm in training takes the mean away, and with it what moved the bias in front of it.
    assert moved >= {"first.A.left", "second.B.left", "norm.weight", "norm.running_mean", "head.weight", "head.bias"}
    assert same(glora.base_state_dict(model), plain)
    with glora.merged(model):
        assert same(glora.base_state_dict(model), plain)


def test_the_base_state_dict_of_a_plain_model_is_its_state_dict() -> None:
    model = build()
    assert same(glora.base_state_dict(model), model.state_dict())


def test_a_layer_that_torch_has_merged_gives_what_it_holds() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model)
    merged = model.first.weight.detach().clone()
    parametrize.remove_parametrizations(model.first, "weight")
    assert same(glora.base_state_dict(model), plain | {"first.weight": merged})


# model.load_state_dict of a plain checkpoint, while adapters are attached.


def remove_one(model: Model, tensor: str | None) -> None:
    """Torch's removal of one tensor's parametrization, where there is one."""
    if tensor is not None and parametrize.is_parametrized(model.first, tensor):
        parametrize.remove_parametrizations(model.first, tensor)


def completed(model: nn.Module, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """These tensors of an adapter, completed by its own for the keys that torch's removal took elsewhere."""
    return clones(glora.state_dict(model, name)) | tensors


@attached
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("without", [None, "weight", "bias"], ids=["whole", "weight removed", "bias removed"])
@pytest.mark.parametrize("kind", [OrderedDict, dict], ids=["with metadata", "bare dict"])
def test_a_plain_checkpoint_loads_strictly_and_the_adapters_stay(
    how: Callable[[nn.Module], None], assign: bool, without: str | None, kind: type[dict[str, Tensor]]
) -> None:
    model = build()
    checkpoint = model.state_dict()
    # A checkpoint as torch saves it carries versions in `_metadata`; one from safetensors is a bare dict.
    given = kind(other_values(checkpoint))
    if kind is OrderedDict:
        given._metadata = checkpoint._metadata  # type: ignore[attr-defined]
    how(model)
    remove_one(model, without)
    adapters, ids, strengths = all_adapters(model), identities(model), glora.adapters(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    keys = list(given)

    assert model.load_state_dict(given, strict=True, assign=assign) == ([], [])

    assert list(given) == keys
    assert same(glora.base_state_dict(model), dict(given))
    assert identities(model) == ids
    after = all_adapters(model)
    assert after.keys() == adapters.keys()
    assert all(same(after[name], adapters[name]) for name in adapters)
    assert glora.adapters(model) == strengths
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags

    # What it computes now is what a model does that had these values before its adapters came.
    fresh = build()
    fresh.load_state_dict(given)
    how(fresh)
    for name, tensors in adapters.items():
        glora.load_state_dict(fresh, tensors if without is None else completed(fresh, tensors, name), name)
    if without != "weight":
        assert torch.equal(model.first.weight, fresh.first.weight)
    if without != "bias":
        assert torch.equal(model.first.bias, fresh.first.bias)
    if without is None:
        assert torch.equal(model(TOKENS), fresh(TOKENS))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_prompt_keeps_a_frozen_weight_of_its_own_after_a_plain_load(assign: bool) -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    parametrize.remove_parametrizations(layer, "weight")
    layer.load_state_dict({"weight": torch.randn(5, 3), "bias": torch.randn(5)}, assign=assign)
    before = layer.bias.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert torch.equal(layer.bias, before)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_plain_checkpoint_older_than_a_counter_leaves_the_bases_counter(assign: bool) -> None:
    # BatchNorm fills in `num_batches_tracked`, which files without versions may lack, with what the module reads as:
    # for a head, the adapter's count.
    model = build()
    given = other_values(model.state_dict())
    del given["norm.num_batches_tracked"]
    attach(model, targets=["first"], trainable=["norm"])
    model.train()(TOKENS)
    assert model.load_state_dict(given, strict=True, assign=assign) == ([], [])
    assert glora.base_state_dict(model)["norm.num_batches_tracked"].item() == 0
    assert glora.state_dict(model)["norm.num_batches_tracked"].item() == 1


@attached
def test_a_wrapped_model_loads_a_plain_checkpoint_too(how: Callable[[nn.Module], None]) -> None:
    model = AveragedModel(build())
    given = other_values(model.state_dict())
    how(model)
    adapters = all_adapters(model)
    assert model.load_state_dict(given, strict=True) == ([], [])
    plain = {key.removeprefix("module."): tensor for key, tensor in given.items() if key != "n_averaged"}
    assert same(glora.base_state_dict(model), plain)
    assert all(same(all_adapters(model)[name], adapters[name]) for name in adapters)


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
    how: Callable[[nn.Module], None], without: str | None, assign: bool, kind: type[dict[str, Tensor]]
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
    assert torch.equal(target(TOKENS), source(TOKENS))


@given(config=CONFIGS)
def test_a_models_state_dict_goes_round_for_every_config(config: GLoRAConfig) -> None:
    source, target = build(), build()
    for model in (source, target):
        attach(model, GLoRAConfig(**{**vars(config), "init": "random"}))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(TOKENS), source(TOKENS))


def test_a_models_state_dict_has_the_keys_of_parametrize() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=GLoRAConfig.lora(rank=1))
    assert set(layer.state_dict()) == {
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0.default.B.left",
        "parametrizations.weight.0.default.B.right",
    }


# After merge and remove.


def values_apart(state: dict[str, object]) -> dict[str, object]:
    return {aspect: value for aspect, value in state.items() if aspect != "values"}


@attached
def test_remove_gives_back_the_model_to_the_last_bit(how: Callable[[nn.Module], None]) -> None:
    model = build()
    before = snapshot(model)
    how(model)
    glora.remove(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("how", [ATTACH[name] for name in ATTACH if name != "created bias"])
def test_merge_gives_back_keys_order_types_identities_and_flags(how: Callable[[nn.Module], None]) -> None:
    model = build()
    before = snapshot(model)
    how(model)
    y = model(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "two" and "inactive" drop an adapter
        glora.merge(model)
    assert values_apart(snapshot(model)) == values_apart(before)
    torch.testing.assert_close(model(TOKENS), y)


def test_a_warning_that_is_made_an_error_leaves_the_model_unmerged() -> None:
    model = build()
    two(model)
    with unchanged(model), pytest.raises(UserWarning, match="'a'"):
        glora.merge(model)


def test_a_created_bias_is_all_that_merge_adds() -> None:
    model = build()
    before = snapshot(model)
    ATTACH["created bias"](model)
    glora.merge(model)
    after = snapshot(model)
    assert isinstance(before["keys"], list)
    at = before["keys"].index("second.weight") + 1
    assert after["keys"] == [*before["keys"][:at], "second.bias", *before["keys"][at:]]
    assert after["types"] == before["types"]


@attached
@in_states
def test_a_while_merged_or_disabled_leaves_no_trace_after_remove(
    how: Callable[[nn.Module], None], state: Callable[[nn.Module], AbstractContextManager[object]]
) -> None:
    model = build()
    before = snapshot(model)
    how(model)
    within = snapshot(model)
    with state(model):
        model(TOKENS)
    assert snapshot(model) == within
    glora.remove(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
@given(bits=st.lists(st.booleans(), min_size=11, max_size=11), freeze=st.booleans(), again=st.booleans())
def test_flags_are_as_before_the_first_apply(
    finish: Callable[[nn.Module], nn.Module], bits: list[bool], freeze: bool, again: bool
) -> None:
    model = build()
    for parameter, bit in zip(model.parameters(), bits, strict=True):
        parameter.requires_grad_(bit)
    attach(model, freeze=freeze, trainable=["head"])
    if again:
        attach(model, name="again", trainable=["norm"], targets=["first", "third"])
        glora.activate(model, {"default": 1.0} if finish is glora.merge else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        finish(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == bits


@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
def test_a_flag_that_was_changed_by_hand_since_stays(finish: Callable[[nn.Module], nn.Module]) -> None:
    model = build()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.first.weight.requires_grad_(False)
    attach(model)
    assert not model.embed.weight.requires_grad
    model.embed.weight.requires_grad_(True)
    model.first.parametrizations.weight.original.requires_grad_(True)
    finish(model)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert after == before | {"embed.weight": True, "first.weight": True}


@pytest.mark.parametrize("order", [("weight", "bias"), ("bias", "weight")], ids="-".join)
@pytest.mark.parametrize("bake", [True, False])
def test_torchs_own_removal_gives_back_all_but_the_flags(order: tuple[str, str], bake: bool) -> None:
    model = build()
    before = snapshot(model)
    attach(model, targets=["first", "third"])
    for layer in (model.first, model.third):
        for tensor in order:
            parametrize.remove_parametrizations(layer, tensor, leave_parametrized=bake)
    after = snapshot(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for aspect in ("types", "keys", "identities"):
        assert after[aspect] == before[aspect]
    assert (after["values"] == before["values"]) is not bake
    assert glora.adapters(model) == {}


def test_merging_a_part_leaves_the_rest_adapted() -> None:
    model = build()
    attach(model)
    glora.merge(model.first)
    assert type(model.first) is nn.Linear
    assert {key.split(".")[0] for key in glora.state_dict(model)} == {"second", "third", "head"}
    assert model.first.weight.requires_grad
    assert not model.norm.weight.requires_grad


# Pickling.


@attached
def test_pickling_an_adapted_model_leads_to_save_and_merge(how: Callable[[nn.Module], None]) -> None:
    model = build()
    how(model)
    with unchanged(model):
        with pytest.raises(RuntimeError, match=r"glora\.save.*glora\.merge"):
            torch.save(model, io.BytesIO())
        with pytest.raises(RuntimeError, match=r"glora\.save.*glora\.merge"):
            pickle.dumps(model)


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@attached
@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
def test_torch_save_works_after_merge_and_remove(
    how: Callable[[nn.Module], None], finish: Callable[[nn.Module], nn.Module]
) -> None:
    model = build()
    how(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        finish(model)
    loaded = through_torch_save(model)
    assert type(loaded) is Model
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_torch_save_inside_merged_saves_a_plain_merged_model() -> None:
    model = build()
    attach(model)
    with glora.merged(model):
        loaded = through_torch_save(model)
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert type(loaded.get_submodule("first")) is nn.Linear
    assert glora.adapters(loaded) == {}


def test_a_state_dict_of_an_adapter_goes_through_torch_save() -> None:
    model = build()
    attach(model, trainable=["norm"])
    file = io.BytesIO()
    torch.save(glora.state_dict(model), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), glora.state_dict(model))
