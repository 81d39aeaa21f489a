"""fully_shard on one rank: what is read is sharded, adapters come off and stand where it looks for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import glora
from glora.engines.fsdp import is_fully_sharded
from glora.tensors import gathered, is_sharded
from tests.helpers import internals
from tests.helpers.models import adapted_block
from tests.helpers.state import same, unchanged

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),  # a linear layer's output is a view
]
X = torch.ones(2, 6)


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: gathered(tensor) for key, tensor in tensors.items()}


def test_what_is_read_after_a_forward_is_sharded_and_gathers_to_what_it_was() -> None:
    model = adapted_block()
    wanted, base = copy.deepcopy(glora.state_dict(model)), copy.deepcopy(glora.base_state_dict(model))
    assert not any(map(is_fully_sharded, model.modules()))
    sharded(model)
    with torch.no_grad():
        model(X)  # without a backward the root holds full parameters
    held = glora.state_dict(model)
    assert {key for key, tensor in held.items() if not is_sharded(tensor)} == {k for k in held if "balance" in k}
    assert same(plain(glora.state_dict(model)), wanted)
    assert same(plain(glora.base_state_dict(model)), base)


@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
def test_adapters_come_off_and_the_layers_stay_sharded_and_train(finish: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted_block()
    wanted = finish(copy.deepcopy(model))
    sharded(model)
    model(X).sum().backward()
    finish(model)
    (group,) = internals.fully_sharded_groups(model)
    places = {(id(module), name) for module in model.modules() for name in module._parameters}
    found = [record._module_info for record in group.fsdp_params]
    assert {(id(info.module), info.param_name) for info in found} == places - {(id(model[1]), "weight")}
    assert same(plain(model.state_dict()), wanted.state_dict())
    torch.testing.assert_close(model(X), wanted(X))
    model(X).sum().backward()
    assert all(is_sharded(parameter) for parameter in model.parameters())


def test_what_is_sharded_cannot_be_plain_for_a_while() -> None:
    model = sharded(adapted_block())
    with unchanged(model), pytest.raises(RuntimeError, match="Inside glora.merged layers have whole, plain tensors"):
        glora.merged(model).__enter__()


def test_a_file_of_a_sharded_model_is_that_of_the_model(tmp_path: Path) -> None:
    model = adapted_block()
    glora.save(model, tmp_path / "one")
    glora.save(sharded(model), tmp_path / "two")
    one, two = ((tmp_path / name / "glora_config.json").read_text() for name in ("one", "two"))
    layers = '"layers"'
    assert one[one.index(layers) :] == two[two.index(layers) :]
