"""Any sequence of calls: the model computes what plain tensors, held beside it, say."""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import glora
from glora import GLoRAConfig
from tests.helpers.calls import quiet
from tests.helpers.lifecycle import CONFIGS, SIZES, Adapter, Net, Saved, Subject, X, paths_for, same
from tests.helpers.state import unchanged

NAMES = ["a", "b", "c"]
HEAD = ("head.weight", "head.bias")
WEIGHTS = [(1.0, 1.0, 1.0), (0.5, -0.5), (1.0, 2.0), (1.0, 0.0, 0.5), (-0.5,), (1.0,), ()]
which = st.integers(0, 1)
number = st.integers(0, 2)
ATTACHED: dict[str, Any] = {
    "which": which,
    "configs": st.dictionaries(st.sampled_from(["first", "second", "first", "second", "head"]), CONFIGS, min_size=1),
    "head": st.booleans(),
    "seed": st.integers(0, 99),
}
adapted: Any = precondition(lambda machine: any(subject.adapters for subject in machine.subjects))


REFUSED_INSIDE_MERGED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("apply", "remove", "merge", "disabled", "delete", "reset_parameters"), ()),
    "activate": ({},),
    "load_state_dict": ({},),
    "route": ([None],),
}


@dataclass
class Pending:
    """A graph whose backward has yet to come, and the gradients that it has to give.

    Attributes:
        checkpointed: its forward will run a second time, which is refused where adapters have come or gone.
        overwritten: numbers that it needs may have been written over, which torch refuses where it sees it.
    """

    loss: Tensor
    right: dict[nn.Parameter, Tensor]
    checkpointed: bool
    overwritten: bool = False


def enter(context: AbstractContextManager[object]) -> None:
    context.__enter__()


class Lifecycle(RuleBasedStateMachine):
    """One model and, once copied, its copy: whatever is done to one leaves the other alone."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.saved: list[Saved] = []
        self.states: list[tuple[dict[str, Tensor], Adapter]] = []
        self.pending: list[Pending] = []
        self.subjects: list[Subject] = []

    @initialize(flags=st.lists(st.booleans(), min_size=5, max_size=5), more=st.booleans(), **ATTACHED)
    def start(self, flags: list[bool], more: bool, configs: dict[str, GLoRAConfig], **drawn: Any) -> None:
        torch.manual_seed(drawn["seed"])
        model = Net()
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        self.subjects = [Subject.of(model)]
        for _ in range(1 + more):
            self.apply(taken=1, configs=configs, **drawn)

    def teardown(self) -> None:
        self.folder.cleanup()

    def at(self, which: int) -> Subject:
        return self.subjects[which % len(self.subjects)]

    def named(self, which: int, number: int) -> tuple[Subject, str]:
        """A model that has adapters, and the name of one."""
        there = [subject for subject in self.subjects if subject.adapters]
        subject = there[which % len(there)]
        return subject, list(subject.adapters)[number % len(subject.adapters)]

    def new_name(self, subject: Subject, taken: int) -> str:
        """A name that no adapter of the model has, as long as there is one; now and then one that is taken."""
        free = [name for name in NAMES if name not in subject.adapters]
        return free[0] if free and taken else NAMES[0]

    @invariant()
    def holds_and_computes_what_it_must(self) -> None:
        for subject in self.subjects:
            subject.check()

    def refused(self, subject: Subject, error: type[Exception], call: Callable[[], object]) -> None:
        with unchanged(subject.model), pytest.raises(error):
            call()

    # Attaching.

    @rule(taken=st.integers(0, 9), **ATTACHED)
    def apply(self, which: int, taken: int, configs: dict[str, GLoRAConfig], head: bool, seed: int) -> None:
        subject = self.at(which)
        self.attach(subject, self.new_name(subject, taken), configs, head, seed)

    @rule(**ATTACHED)
    def apply_another(self, which: int, configs: dict[str, GLoRAConfig], head: bool, seed: int) -> None:
        self.apply(which, 1, configs, head, seed)  # once more: put on about as often as taken off

    def attach(self, subject: Subject, name: str, configs: dict[str, GLoRAConfig], head: bool, seed: int) -> None:
        head = head and "head" not in configs

        def call() -> None:
            torch.manual_seed(seed)
            with quiet():
                glora.apply(subject.model, configs, trainable=["head"] if head else (), name=name)

        paths = {layer: paths_for(subject.layers[layer], config) for layer, config in configs.items()}
        if name in subject.adapters or not any(paths.values()) or not self.fits(subject, list(configs), head):
            self.refused(subject, ValueError, call)
            return
        call()
        found = {key: tensor.clone() for key, tensor in glora.state_dict(subject.model, name).items()}
        forms = {key: tensor for key, tensor in found.items() if key.count(".") == 2}
        assert {key[: key.rindex(".")] for key in forms} == {f"{layer}.{p}" for layer in paths for p in paths[layer]}
        assert all(tensor.dtype == subject.factor_dtype for tensor in forms.values())
        heads = {key: tensor for key, tensor in found.items() if key not in forms}
        dtype = subject.factor_dtype
        same(heads, {key: t.to(dtype) for key, t in subject.base.items() if head and key.startswith("head.")})
        subject.attached(name, Adapter(configs, found))

    def fits(self, subject: Subject, targets: list[str], head: bool) -> bool:
        """Whether an adapter of these layers, and of the head as a whole, can be attached."""
        if any(subject.has_frozen_prompt(layer) for layer in targets):
            return False
        return not (("head" in targets and subject.trains_the_head()) or (head and subject.forms_the_head()))

    @precondition(lambda self: bool(self.saved))
    @rule(which=which, taken=st.integers(0, 9), index=st.integers(0, 3), trainable=st.booleans())
    def load(self, which: int, taken: int, index: int, trainable: bool) -> None:
        subject, saved = self.at(which), self.saved[index % len(self.saved)]
        name = self.new_name(subject, taken)

        def call() -> object:
            return glora.load(subject.model, saved.folder, name, trainable=trainable)

        targets = list({key.split(".")[0] for key in saved.adapter.tensors if key.count(".") == 2})
        same_biases = all(subject.layers[layer].has_own_bias is saved.biases[layer] for layer in targets)
        head = "head.weight" in saved.adapter.tensors
        if name in subject.adapters or not same_biases or not self.fits(subject, targets, head):
            self.refused(subject, ValueError, call)
            return
        with quiet():  # of another base
            call()
        subject.attached(name, self.as_loaded(subject, saved.adapter, trainable))

    def as_loaded(self, subject: Subject, adapter: Adapter, trainable: bool = True) -> Adapter:
        """The adapter as it is in a model of this dtype."""
        tensors = {key: tensor.to(subject.factor_dtype) for key, tensor in adapter.tensors.items()}
        return Adapter(dict(adapter.configs), tensors, trainable)

    @adapted
    @rule(which=which, number=number)
    def save(self, which: int, number: int) -> None:
        subject, name = self.named(which, number)
        folder = Path(self.folder.name) / str(len(self.saved))
        adapter = subject.adapters[name]
        half_a_head = len({key for key in adapter.tensors if key in HEAD}) == 1
        prompts = {key.split(".")[0] for key in adapter.tensors if ".C." in key}
        if half_a_head or any(subject.has_frozen_prompt(layer) for layer in prompts):
            self.refused(subject, RuntimeError, lambda: glora.save(subject.model, folder, name))
            return
        with unchanged(subject.model):
            glora.save(subject.model, folder, name)
        biases = {layer: state.has_own_bias for layer, state in subject.layers.items()}
        self.saved.append(Saved(folder, copy.deepcopy(adapter), biases))
        # A fresh model with the same base computes the same.
        fresh = Net(tuple(layer for layer, own in biases.items() if not own), subject.dtype)
        fresh.load_state_dict(subject.base)
        known = Subject.of(fresh)
        glora.load(fresh, folder, name)
        known.attached(name, self.as_loaded(known, adapter))
        known.check()

    # Which act.

    @adapted
    @rule(which=which, order=st.permutations(range(3)), weights=st.sampled_from(WEIGHTS))
    def activate(self, which: int, order: list[int], weights: tuple[float, ...]) -> None:
        subject, _ = self.named(which, 0)
        there = list(subject.adapters)
        chosen = [there[i] for i in order if i < len(there)]
        given = dict(zip(chosen, weights, strict=False)) if weights != (1.0,) else chosen[0]
        acting = {given: 1.0} if isinstance(given, str) else {name: w for name, w in given.items() if w}
        for key in HEAD:
            copies = [subject.adapters[name].tensors.get(key, subject.base[key]) for name in acting]
            if subject.trains_the_head() and any(not torch.equal(copies[0], other) for other in copies):
                self.refused(subject, ValueError, lambda: glora.activate(subject.model, given))
                return
        glora.activate(subject.model, given)
        subject.acting = acting

    @adapted
    @rule(which=which, numbers=st.lists(st.integers(-1, 2), min_size=3, max_size=3))
    def route(self, which: int, numbers: list[int]) -> None:
        subject, _ = self.named(which, 0)
        there = list(subject.adapters)
        choice = [None if number < 0 else there[number % len(there)] for number in numbers]
        with unchanged(subject.model), glora.route(subject.model, choice):
            for layer in SIZES:
                y = subject.run(layer)
                for row, name in enumerate(choice):
                    value, bound = subject.output(layer, {} if name is None else {name: 1.0})
                    subject.close(y[row], (value[row], bound[row]))
            with pytest.raises(RuntimeError, match="Inside glora.route"):
                glora.activate(subject.model, {})

    @adapted
    @rule(which=which)
    def disabled(self, which: int) -> None:
        subject, _ = self.named(which, 0)
        with unchanged(subject.model), glora.disabled(subject.model):
            for layer, state in subject.layers.items():
                bias = torch.zeros(len(state.weight), dtype=subject.dtype) if state.bias is None else state.bias
                x = X[SIZES[layer][1]].to(subject.dtype)
                assert torch.equal(getattr(subject.model, layer).weight, state.weight)
                if state.has_own_bias:
                    assert torch.equal(subject.run(layer), nn.functional.linear(x, state.weight, bias))
                else:
                    subject.close(subject.run(layer), subject.output(layer, {}))

    @adapted
    @rule(which=which, refuse=st.sampled_from(sorted(REFUSED_INSIDE_MERGED)))
    def merged(self, which: int, refuse: str) -> None:
        subject, name = self.named(which, 0)
        values = [getattr(subject.model, layer).weight.detach().clone() for layer in SIZES]
        arguments: tuple[Any, ...] = REFUSED_INSIDE_MERGED[refuse]
        arguments = (name,) if refuse in ("delete", "reset_parameters") else arguments
        with unchanged(subject.model):
            with glora.merged(subject.model):
                for layer, value in zip(SIZES, values, strict=True):
                    module = getattr(subject.model, layer)
                    assert type(module) is nn.Linear
                    assert torch.equal(module.weight, value)
                    subject.close(subject.run(layer), subject.output(layer, subject.acting))
                same(glora.base_state_dict(subject.model), subject.base)
                with pytest.raises(RuntimeError, match="Inside glora.merged"):
                    enter(getattr(glora, refuse)(subject.model, *arguments))
                replica = copy.deepcopy(subject.model)
            glora.remove(replica)  # does nothing: it is merged for good
            for layer, value in zip(SIZES, values, strict=True):
                assert torch.equal(getattr(replica, layer).weight, value)

    # Taking off.

    @adapted
    @rule(which=which, number=number)
    def delete(self, which: int, number: int) -> None:
        subject, name = self.named(which, number)
        glora.delete(subject.model, name)
        subject.dropped(name)
        if not subject.adapters:
            subject.freed()

    @adapted
    @rule(which=which, merge=st.booleans(), twice=st.booleans())
    def finish(self, which: int, merge: bool, twice: bool) -> None:
        self.overwritten()
        subject, _ = self.named(which, 0)
        if merge and subject.is_large():
            return
        kept = {
            (layer, tensor): getattr(getattr(subject.model, layer), tensor).detach().clone()
            for layer in SIZES
            for tensor in ("weight", "bias")
            if merge and subject.acts(layer, tensor)
        }
        with quiet():
            (glora.merge if merge else glora.remove)(subject.model)
        for (layer, tensor), value in kept.items():
            subject.taken_off(layer, tensor, value)
        subject.freed()
        if twice:
            with unchanged(subject.model):
                glora.merge(glora.remove(subject.model))

    @adapted
    @rule(which=which, number=st.integers(0, 5), bake=st.sampled_from([True, True, False]))
    def torchs_own_removal(self, which: int, number: int, bake: bool) -> None:
        self.overwritten()
        subject, _ = self.named(which, 0)
        there = [(layer, tensor) for layer in SIZES for tensor in ("weight", "bias") if subject.has(layer, tensor)]
        layer, tensor = there[number % len(there)]
        bake = bake and not subject.is_large()
        module = getattr(subject.model, layer)
        value = getattr(module, tensor).detach().clone()
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=bake)
        subject.taken_off(layer, tensor, value if bake else None)

    # Copies, conversions, tensors.

    @adapted
    @rule(which=which)
    def deepcopy(self, which: int) -> None:
        subject, _ = self.named(which, 0)
        self.subjects = [subject, copy.deepcopy(subject)]

    @adapted
    @rule(which=which, to=st.sampled_from(["half", "float", "double"]), inside=st.booleans())
    def convert(self, which: int, to: str, inside: bool) -> None:
        self.overwritten()
        subject = self.named(which, 0)[0]
        if inside:
            with glora.merged(subject.model):
                getattr(subject.model, to)()
        else:
            getattr(subject.model, to)()
        dtype = {"half": torch.float16, "float": torch.float32, "double": torch.float64}[to]
        if not inside or dtype != subject.dtype:  # a conversion to what the layers are already is not seen from inside
            subject.converted(dtype)

    @adapted
    @rule(which=which, number=number, seed=st.integers(0, 99), strict=st.booleans())
    def load_state_dict(self, which: int, number: int, seed: int, strict: bool) -> None:
        self.overwritten()
        subject, name = self.named(which, number)
        adapter = subject.adapters[name]
        torch.manual_seed(seed)
        given = {
            key: 0.3 * torch.randn(tensor.shape)
            for key, tensor in adapter.tensors.items()
            if len(subject.acting) < 2 or key.count(".") == 2  # heads that act together stay equal
        }
        if strict and (given.keys() != adapter.tensors.keys() or seed < 20):
            given.pop(next(iter(given)), None)
            self.refused(subject, ValueError, lambda: glora.load_state_dict(subject.model, given, name))
            return
        glora.load_state_dict(subject.model, given, name, strict)
        for key, tensor in given.items():
            adapter.tensors[key] = tensor.to(adapter.tensors[key].dtype)

    @adapted
    @rule(which=which, seed=st.integers(0, 99), assign=st.booleans())
    def load_a_plain_checkpoint(self, which: int, seed: int, assign: bool) -> None:
        self.overwritten()
        subject = self.named(which, 0)[0]
        torch.manual_seed(seed)
        given = {key: 0.5 * torch.randn_like(tensor) for key, tensor in subject.base.items()}
        assert subject.model.load_state_dict({k: t.clone() for k, t in given.items()}, assign=assign) == ([], [])
        for layer, state in subject.layers.items():
            state.weight = given[f"{layer}.weight"]
            if state.has_own_bias:
                state.bias = given[f"{layer}.bias"]

    @adapted
    @rule(which=which)
    def train(self, which: int) -> None:
        subject, _ = self.named(which, 0)
        x = X[3].to(subject.dtype)
        y = subject.model(x)
        wanted = [
            (name, key)
            for name in subject.adapters
            for key, parameter in glora.named_parameters(subject.model, name)
            if parameter.requires_grad
        ]
        if not y.requires_grad:
            assert not wanted
            return
        y.float().square().sum().backward()
        for parameter in subject.model.parameters():
            assert parameter.requires_grad or parameter.grad is None
            parameter.grad = None

    # Between a forward and its backward, anything above may come.

    @adapted
    @rule(which=which, layer=st.sampled_from(sorted(SIZES)), checkpointed=st.booleans())
    def forward(self, which: int, layer: str, checkpointed: bool) -> None:
        subject, _ = self.named(which, 0)
        module, x = getattr(subject.model, layer), X[SIZES[layer][1]].to(subject.dtype)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if trained:
            alone = module(x).float().square().sum()
            gradients = torch.autograd.grad(alone, trained, allow_unused=True)
            right = {p: g for p, g in zip(trained, gradients, strict=True) if g is not None and g.isfinite().all()}
            y = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
            self.pending.append(Pending(y.float().square().sum(), right, checkpointed))

    @precondition(lambda self: bool(self.pending))
    @rule(index=st.integers(0, 3))
    def backward(self, index: int) -> None:
        pending = self.pending.pop(index % len(self.pending))
        flags = {parameter: parameter.requires_grad for parameter in pending.right}
        try:
            pending.loss.backward()
        except RuntimeError:
            if not (pending.checkpointed or pending.overwritten):
                raise
            return
        found = {parameter: parameter.grad for parameter in pending.right}
        for parameter in pending.right:
            parameter.grad = None
        assert flags == {parameter: parameter.requires_grad for parameter in pending.right}
        if not pending.overwritten:
            for parameter, right in pending.right.items():
                torch.testing.assert_close(found[parameter], right, atol=1e-3, rtol=1e-3)

    def overwritten(self) -> None:
        for pending in self.pending:
            pending.overwritten = True

    @adapted
    @rule(which=which, number=number)
    def take_state(self, which: int, number: int) -> None:
        subject, name = self.named(which, number)
        torch.save(glora.state_dict(subject.model, name), file := io.BytesIO())
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        self.states.append((state, copy.deepcopy(subject.adapters[name])))

    @adapted
    @precondition(lambda self: bool(self.states))
    @rule(which=which, number=number, index=st.integers(0, 3))
    def restore_state(self, which: int, number: int, index: int) -> None:
        self.overwritten()
        subject, name = self.named(which, number)
        adapter, (state, source) = subject.adapters[name], self.states[index % len(self.states)]
        shapes = [{key: tensor.shape for key, tensor in tensors.items()} for tensors in (adapter.tensors, state)]
        if shapes[0] != shapes[1] or not same_function(adapter, source):
            self.refused(subject, ValueError, lambda: glora.load_state_dict(subject.model, state, name))
            return
        if len(subject.acting) < 2 or not any(key in state for key in HEAD):  # heads that act together stay equal
            glora.load_state_dict(subject.model, state, name)
            adapter.tensors = {key: state[key].to(tensor.dtype) for key, tensor in adapter.tensors.items()}


def same_function(one: Adapter, other: Adapter) -> bool:
    """Whether equal tensors are equal updates: alpha / rank agrees where a path is low rank, the product where A is."""
    paths = {tuple(key.split(".")[:2]) for key in one.tensors if key.count(".") == 2}
    for layer, path in paths:
        a, b = one.configs[layer], other.configs[layer]
        low_rank = f"{layer}.{path}.left" in one.tensors
        if low_rank and one.scaling(layer) != other.scaling(layer):
            return False
        if path == "A" and a.A != "constant" and a.product != b.product:
            return False
    return True


PROFILES = {"pinned": (200, 30), "long": (2000, 60), "mutation": (15, 20), "fresh": (50, 30)}
EXAMPLES, STEPS = PROFILES.get(os.environ.get("HYPOTHESIS_PROFILE", ""), (40, 30))
TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS)


def test_a_half_removed_head_is_not_saved(tmp_path: Path) -> None:
    model = glora.apply(Net(), ["first"], GLoRAConfig.lora(rank=1), trainable=["head"])
    parametrize.remove_parametrizations(model.head, "weight")
    with pytest.raises(RuntimeError, match="head"):
        glora.save(model, tmp_path)


def test_of_two_heads_that_act_together_the_one_that_is_left_trains_again() -> None:
    machine, config = Lifecycle(), GLoRAConfig.glora(rank=1, init="random")
    machine.start([True] * 5, more=True, configs={"first": config}, which=0, head=True, seed=0)
    for step in (lambda: machine.activate(0, [0, 1, 2], (1.0, 1.0)), lambda: machine.delete(0, 0), machine.teardown):
        step()
        machine.holds_and_computes_what_it_must()
