"""accelerate's offloading: right numbers after attaching, and clear words before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import glora
from tests.helpers.calls import RANDOM, refused
from tests.helpers.models import adapted_block, block

accelerate: Any = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTED = ["ParametrizedLinear"]


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize("preload", [True, False])
def test_an_attached_model_is_offloaded_as_a_whole_or_refuses(how: str, preload: bool, tmp_path: Path) -> None:
    model, x = adapted_block(), torch.randn(3, 6)
    expected, state = model(x).detach(), {key: t.clone() for key, t in glora.state_dict(model).items()}
    given: dict[str, Any] = {"preload_module_classes": ADAPTED} if preload else {}
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu", **given)
    elif how == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu", **given)
    else:
        places = {"0": "cpu", "1": "cpu", "2": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True, **given)
    if preload:
        assert torch.equal(model(x), expected)
    else:
        with pytest.raises(RuntimeError, match="preload_module_classes=.'ParametrizedLinear'"):
            model(x)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(glora.state_dict(model), state)


def test_an_offloaded_layer_takes_no_adapter() -> None:
    model, x = block(), torch.randn(3, 6)
    expected = model(x).detach()
    accelerate.cpu_offload(model, execution_device="cpu")
    refused(model, "accelerate has offloaded its weights.*remove_hook_from_submodules", targets=["0", "2"])
    assert torch.equal(model(x), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    glora.apply(model, config=RANDOM)


def test_a_prepared_model_trains_and_saves_its_state(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, x = adapted_block(), torch.randn(3, 6)
    prepared, optimizer = accelerator.prepare(model, torch.optim.Adam(glora.parameters(model)))

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(prepared(x).square().mean())
        optimizer.step()

    step()
    accelerator.save_state(tmp_path)
    step()
    expected = {key: tensor.clone() for key, tensor in glora.state_dict(prepared).items()}
    accelerator.load_state(tmp_path)
    step()
    for key, tensor in glora.state_dict(prepared).items():
        assert torch.equal(tensor, expected[key])
