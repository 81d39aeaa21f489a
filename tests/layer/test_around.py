"""What torch puts around a model: ensembles by vmap, averages of weights, saved tensors elsewhere, scaled gradients."""

from __future__ import annotations

import copy
import multiprocessing
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call, stack_module_state
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, step
from tests.helpers.models import adapted_block, block

CONFIGS = {
    "default": RANDOM,
    "vectors": GLoRAConfig(A="vector", B="vector", init="random"),
    "matmul": GLoRAConfig(product="matmul", rank=2, init="random"),
    "lora": GLoRAConfig.lora(rank=2, init="random"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def attached(config: GLoRAConfig = RANDOM) -> nn.Module:
    return glora.apply(block(), config=config)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {key: None if p.grad is None else p.grad.clone() for key, p in glora.named_parameters(model)}
    model.zero_grad()
    return found


@configs
def test_an_ensemble_by_vmap_is_each_model_alone(config: GLoRAConfig) -> None:
    base = block()
    models = [glora.apply(copy.deepcopy(base), config=config) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(4, 6)
    single = copy.deepcopy(models[0]).to("meta")

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = functional_call(single, (parameters, buffers), (x,))
        return y.square().mean(), y

    grads, y = torch.vmap(torch.func.grad(loss, has_aux=True))(parameters, buffers)
    for index, model in enumerate(models):
        torch.testing.assert_close(y[index], model(x), rtol=1e-4, atol=1e-5)
        model(x).square().mean().backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(grads[key][index], parameter.grad, rtol=1e-4, atol=1e-5)


@configs
@pytest.mark.parametrize("how", ["ema", "swa"])
def test_an_averaged_model_is_the_average_of_its_adapters(config: GLoRAConfig, how: str) -> None:
    model, x = attached(config), torch.randn(4, 6)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if how == "ema" else None)
    average.update_parameters(model)
    expected = {key: tensor.clone() for key, tensor in glora.state_dict(model).items()}
    frozen = {key: tensor.clone() for key, tensor in glora.base_state_dict(model).items()}
    for count in range(1, 4):
        step(model, x)
        average.update_parameters(model)
        share = 0.5 if how == "ema" else 1 / (count + 1)
        for key, tensor in glora.state_dict(model).items():
            expected[key] += share * (tensor - expected[key])
    torch.testing.assert_close(glora.state_dict(average), expected)
    torch.testing.assert_close(glora.base_state_dict(average), frozen)
    update_bn([x], average)
    merged = glora.merge(copy.deepcopy(average.module))
    torch.testing.assert_close(merged(x), average(x), rtol=1e-4, atol=1e-5)


def test_a_schedule_of_swa_steps_the_rates_of_factors() -> None:
    model = attached()
    optimizer = torch.optim.SGD(glora.parameters(model), lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=1)
    step(model, torch.randn(4, 6))
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@configs
def test_saved_tensors_may_be_kept_elsewhere(config: GLoRAConfig) -> None:
    model, x = attached(config), torch.randn(4, 6)
    model(x).square().mean().backward()
    expected = gradients(model)
    with save_on_cpu(pin_memory=False):
        loss = model(x).square().mean()
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


@configs
def test_scaled_gradients_train_alike_and_an_overflow_is_skipped(config: GLoRAConfig) -> None:
    model, x = attached(config), torch.randn(4, 6)
    alone = copy.deepcopy(model)
    step(alone, x)
    optimizer = torch.optim.SGD(glora.parameters(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for scale in (1.0, float("inf")):  # the second step overflows, and is left out
        scaler.scale(model(x).square().mean() * scale).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 512.0
    torch.testing.assert_close(glora.state_dict(model), glora.state_dict(alone), rtol=1e-4, atol=1e-6)


def in_a_child(queue: Any, model: nn.Module, x: Tensor) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        y = model(x)
    step(model, x)
    queue.put([t.tolist() for t in (y, *glora.state_dict(model).values())])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_serves_and_trains_a_copy() -> None:
    model, x = adapted_block(), torch.randn(4, 6)
    before = {key: tensor.clone() for key, tensor in glora.state_dict(model).items()}
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_a_child, args=(queue, model, x))
    child.start()
    y, *trained = [torch.tensor(values) for values in queue.get()]
    child.join()
    assert child.exitcode == 0
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(glora.state_dict(model), before, rtol=0, atol=0)
    step(model, x)
    torch.testing.assert_close(trained, list(glora.state_dict(model).values()), rtol=1e-5, atol=1e-6)
