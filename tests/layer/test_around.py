"""What torch puts around a model: ensembles by vmap, averages of weights, saved tensors elsewhere, scaled gradients."""

# pyright: reportDeprecated=false, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call, stack_module_state
from torch.nn.utils import prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, step
from tests.helpers.models import adapted_block, block
from tests.helpers.state import unchanged

CONFIGS = {
    "default": RANDOM,
    "vectors": GLoRAConfig.glora(A="vector", B="vector", init="random"),
    "matmul": GLoRAConfig.glora(product="matmul", rank=2, init="random"),
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
def received(queue: Any, child: Any, limit: float = 120.0) -> Any:
    """What a child has sent; an error where it has died without a word, or takes too long."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        alive = child.is_alive()  # before the look: what it sent last is there then
        with contextlib.suppress(Empty):
            return queue.get(timeout=1)
        assert alive, f"the child ended with exit code {child.exitcode} and sent nothing"
    raise AssertionError(f"the child sent nothing in {limit} seconds")


def dies(_: Any) -> None:
    os._exit(3)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the runner's, of 3.12 on
def test_a_child_that_dies_is_noticed() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=dies, args=(queue,))
    child.start()
    with pytest.raises(AssertionError, match="ended with exit code 3"):
        received(queue, child)


# With CUDA, autograd has threads of its own once anything was differentiated, and a forked child cannot differentiate.
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch is built with CUDA")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the runner's, of 3.12 on
def test_a_forked_child_serves_and_trains_a_copy() -> None:
    model, x = adapted_block(), torch.randn(4, 6)
    before = {key: tensor.clone() for key, tensor in glora.state_dict(model).items()}
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(queue, model, x))
    child.start()
    try:
        y, *trained = [torch.tensor(values) for values in received(queue, child)]
        child.join(60)
    finally:
        child.kill()
    assert child.exitcode == 0
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(glora.state_dict(model), before, rtol=0, atol=0)
    step(model, x)
    torch.testing.assert_close(trained, list(glora.state_dict(model).values()), rtol=1e-5, atol=1e-6)


def prepared(model: nn.Module) -> None:
    model.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(model, inplace=True)


def prepared_for_training(model: nn.Module) -> None:
    model.train().qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)


def prepared_as_a_graph(model: nn.Module) -> None:
    from torch.ao.quantization.quantize_fx import prepare_fx

    prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (torch.randn(2, 6),))


QUANTISING: dict[str, Callable[[nn.Module], object]] = {
    "dynamic": quantization.quantize_dynamic,
    "dynamic, by kind": lambda model: quantization.quantize_dynamic(model, {nn.Linear}),
    "dynamic, float16": lambda model: quantization.quantize_dynamic(model, dtype=torch.float16),
    "dynamic, in place": lambda model: quantization.quantize_dynamic(model, inplace=True),
    "static": prepared,
    "training": prepared_for_training,
    "graph": prepared_as_a_graph,
    "the layer alone": lambda model: setattr(model[0], "qconfig", quantization.default_dynamic_qconfig),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quantise", QUANTISING.values(), ids=QUANTISING)
def test_eager_quantisation_is_refused_and_works_merged(quantise: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    glora.apply(model, ["0"], GLoRAConfig.glora(init="random"))
    x = torch.randn(3, 6)
    y = model(x)
    quantization.quantize_dynamic(model, {nn.LSTM})  # which leaves adapted layers alone
    with pytest.raises(RuntimeError, match=r"torch\.ao quantises layers of the types that it knows.*glora\.merge"):
        quantise(model)
    assert torch.equal(model(x), y)
    with glora.merged(model):
        quantise(copy.deepcopy(model))
    assert torch.equal(model(x), y)


SPLITTING: dict[str, Callable[[nn.Module, str], object]] = {
    "pruning": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
    "random pruning": lambda layer, name: prune.random_unstructured(layer, name, 1),
    "pruning by a mask": lambda layer, name: prune.custom_from_mask(layer, name, torch.ones_like(getattr(layer, name))),
    "no pruning": prune.identity,
    "weight_norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("split", SPLITTING.values(), ids=SPLITTING)
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "config", [RANDOM, GLoRAConfig.lora(init="random"), GLoRAConfig.bitfit(init="random")], ids=str
)
def test_pruning_and_weight_norm_are_refused_and_leave_the_layer(
    split: Callable[[nn.Module, str], object], name: str, config: GLoRAConfig
) -> None:
    model, x = glora.apply(nn.Sequential(nn.Linear(6, 4)), config=config), torch.randn(3, 6)
    if name not in model[0].parametrizations:
        return
    y, names = model(x), list(model[0]._parameters)
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match=f"`{name}` of this Para.*cannot take its place.*glora.merge"),
    ):
        split(model[0], name)
    assert torch.equal(model(x), y)
    assert list(model[0]._parameters) == names
    assert list(glora.merge(model).state_dict()) == ["0.weight", "0.bias"]
    split(model[0], name)
