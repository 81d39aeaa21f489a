"""Any order of operations: after each of them the model is what plain tensors say."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor
from torch.nn.utils import parametrize

import glora
from glora.config import FORMS
from tests.helpers.calls import quiet
from tests.helpers.lifecycle import Expected, model_of

X = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NAMES = ["a", "b", "c"]


@st.composite
def any_config(draw: st.DrawFn) -> glora.GLoRAConfig:
    forms: dict[str, Any] = {path: draw(st.sampled_from(allowed)) for path, allowed in FORMS.items()}
    forms["B"] = forms["B"] if forms["A"] != "none" or forms["B"] != "none" else "lora"
    return glora.GLoRAConfig(
        **forms,
        rank=draw(st.integers(1, 2)),
        alpha=draw(st.sampled_from([None, 3.0])),
        product=draw(st.sampled_from(["hadamard", "matmul"])),
        init="random",
        create_bias=draw(st.booleans()),
    )


class Lifecycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = model_of()
        self.expected = Expected.plain(self.model)
        self.configs: dict[str, glora.GLoRAConfig] = {}
        self.strangers: list[tuple[Any, Expected]] = []

    def close(self, found: Tensor, wanted: Tensor) -> None:
        bound = 1e-9 if found.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)

    def half_removed(self, index: int) -> bool:
        return self.expected.layers[index].prompted is not None

    def run(self, model: Any) -> Tensor:
        return model(X).detach()

    # What changes

    @rule(name=st.sampled_from(NAMES), config=any_config(), both=st.booleans(), head=st.booleans())
    def apply(self, name: str, config: glora.GLoRAConfig, both: bool, head: bool) -> None:
        targets = [0, 1] if both else [0]
        trainable = ["2"] if head else ()
        call = lambda: glora.apply(self.model, [*map(str, targets)], config, trainable=trainable, name=name)  # noqa: E731
        if name in self.expected.names() or any(map(self.half_removed, targets)):
            with pytest.raises(ValueError, match="attached already|not: torch's removal"):
                call()
            return
        with quiet():
            call()
        if head:  # trained a little
            with torch.no_grad():
                dict(glora.named_parameters(self.model, name))["2.weight"].add_(1.0 + NAMES.index(name))
        self.configs[name] = config
        self.expected.take(self.model, name, config, targets, head)

    @precondition(lambda self: self.expected.names())
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.expected.names())), unique=True))
        scales = {name: data.draw(st.sampled_from([1.0, 0.5, -2.0])) for name in names}
        if self.expected.heads_differ(scales):
            with pytest.raises(ValueError, match="Heads do not add up"):
                glora.activate(self.model, scales)
            return
        glora.activate(self.model, scales)
        self.expected.scales = scales

    @precondition(lambda self: self.expected.names())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected.names())))
        glora.delete(self.model, name)
        self.expected.forget(name)

    @rule()
    def convert(self) -> None:
        self.model.float().double()  # the numbers of float32, exactly
        self.reread()

    def reread(self) -> None:
        """Take the numbers anew, after they were rounded."""
        base = glora.base_state_dict(self.model)
        for index, layer in enumerate(self.expected.layers):
            layer.weight = base[f"{index}.weight"].double().clone()
            if f"{index}.bias" in base:
                layer.bias = base[f"{index}.bias"].double().clone()
            layer.prompted = None if layer.prompted is None else layer.prompted.float().double()
        scales = dict(self.expected.scales)
        for name in sorted(self.expected.names()):
            on = [i for i in (0, 1) if name in self.expected.layers[i].names()]
            before = [(set(layer.on_weight), set(layer.on_bias)) for layer in self.expected.layers]
            self.expected.take(self.model, name, self.configs[name], on, name in self.expected.layers[2].heads)
            for layer, (weights, biases) in zip(self.expected.layers, before, strict=True):
                layer.on_weight = {n: v for n, v in layer.on_weight.items() if n in weights}
                layer.on_bias = {n: v for n, v in layer.on_bias.items() if n in biases}
        self.expected.scales = scales

    @precondition(lambda self: self.expected.names())
    @rule(index=st.sampled_from([0, 1]), tensor=st.sampled_from(["weight", "bias"]), bake=st.booleans())
    def remove_with_torch(self, index: int, tensor: str, bake: bool) -> None:
        layer, module = self.expected.layers[index], self.model[index]
        assume(parametrize.is_parametrized(module, tensor) and not layer.created)
        scales = self.expected.scales
        weight, bias = layer.adapted_weight(scales), layer.adapted_bias(scales)
        prompts = any(numbers["C"] is not None for numbers in layer.on_bias.values())
        changed = any(name in layer.on_weight for name in scales)
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=bake)
        if tensor == "weight":
            if bake and changed and prompts and layer.prompted is None:
                layer.prompted = layer.weight
            layer.weight, layer.on_weight = (weight if bake else layer.weight), {}
        else:
            layer.bias, layer.on_bias = (bias if bake else layer.bias), {}
        self.expected.settle(layer)

    @rule(merge=st.booleans())
    def finish(self, merge: bool) -> None:
        scales = dict(self.expected.scales)
        with quiet():
            (glora.merge if merge else glora.remove)(self.model)
        for layer in self.expected.layers:
            if merge:
                weight, bias = layer.adapted_weight(scales), layer.adapted_bias(scales)
                if layer.created and not any(name in layer.on_bias for name in scales):
                    bias = None
                layer.weight, layer.bias, layer.created = weight, bias, False
            for held in (layer.on_weight, layer.on_bias, layer.heads):
                held.clear()
            self.expected.settle(layer)
        self.expected.scales = {}
        assert [type(module) for module in self.model] == [type(module) for module in model_of()]

    @rule(seed=st.integers(0, 3))
    def load_a_plain_checkpoint(self, seed: int) -> None:
        base = {key: torch.randn_like(value) for key, value in glora.base_state_dict(self.model).items()}
        del seed
        self.model.load_state_dict(base, strict=True)
        for index, layer in enumerate(self.expected.layers):
            layer.weight = base[f"{index}.weight"].double().clone()
            if f"{index}.bias" in base:
                layer.bias = base[f"{index}.bias"].double().clone()
            layer.prompted = None if layer.prompted is None else layer.weight.clone()

    @rule()
    def copy(self) -> None:
        self.strangers = [(self.model, self.expected.copy())]
        self.model = copy.deepcopy(self.model)

    # What only looks

    @rule()
    def run_disabled(self) -> None:
        with glora.disabled(self.model):
            self.close(self.run(self.model), self.expected.run(X, {}))

    @rule()
    def run_merged(self) -> None:
        with glora.merged(self.model):
            assert not any(parametrize.is_parametrized(module) for module in self.model)
            layer = self.expected.layers[1]
            stays = layer.bias is not None and (
                not layer.created or any(n in layer.on_bias for n in self.expected.scales)
            )
            assert ("1.bias" in self.model.state_dict()) == stays
            self.close(self.run(self.model), self.expected.run(X))

    @precondition(lambda self: self.expected.names())
    @rule(data=st.data())
    def run_routed(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from([*sorted(self.expected.names()), None]), min_size=3, max_size=3))
        with glora.route(self.model, names):
            y = self.run(self.model)
        for row, name in enumerate(names):
            self.close(y[row], self.expected.run(X, {} if name is None else {name: 1.0})[row])

    @precondition(lambda self: self.expected.names() and not any(map(self.half_removed, [0, 1])))
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected.names())))
        plain = model_of(next(iter(glora.base_state_dict(self.model).values())).dtype)
        layer = self.expected.layers[1]
        assume(layer.bias is None or layer.created)  # else a merge has left a created bias for good
        plain.load_state_dict(glora.base_state_dict(self.model))
        with tempfile.TemporaryDirectory() as folder:
            glora.save(self.model, folder, name)
            glora.load(plain, folder, name)
        self.close(self.run(plain), self.expected.run(X, {name: 1.0}))
        values = {key: torch.zeros_like(value) for key, value in glora.state_dict(plain).items()}
        glora.load_state_dict(plain, values)
        glora.load_state_dict(plain, glora.state_dict(self.model, name))
        self.close(self.run(plain), self.expected.run(X, {name: 1.0}))

    # What always holds

    @invariant()
    def all_is_as_expected(self) -> None:
        for model, expected in [(self.model, self.expected), *self.strangers]:
            self.close(self.run(model), expected.run(X))
            for index, layer in enumerate(expected.layers):
                self.close(model[index].weight.detach(), layer.adapted_weight(expected.scales))
                bias = layer.adapted_bias(expected.scales)
                assert (model[index].bias is None) == (bias is None)
                if bias is not None:
                    self.close(model[index].bias.detach(), bias)
            base = glora.base_state_dict(model)
            for index, layer in enumerate(expected.layers):
                self.close(base[f"{index}.weight"], layer.weight)
                assert (f"{index}.bias" in base) == (layer.bias is not None and not layer.created)
            assert glora.adapters(model) == {n: expected.scales.get(n, 0.0) for n in glora.adapters(model)}
            assert set(glora.adapters(model)) == expected.names()
            for name in expected.names():
                acts = name in expected.scales and len(expected.scales) == 1
                for key, parameter in glora.named_parameters(model, name):
                    if not key.startswith("2."):
                        assert parameter.requires_grad == (name in expected.scales)
                    elif acts:
                        assert parameter.requires_grad


EXAMPLES, STEPS = {"long": (2000, 60), "mutation": (15, 20)}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), (200, 30))
TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS)
