"""Lightning: checkpoints of the adapter alone, and the same numbers after resuming; Fabric's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from tests.helpers.calls import RANDOM
from tests.helpers.models import Residual, block

lightning: Any = pytest.importorskip("lightning")
callbacks: Any = pytest.importorskip("lightning.pytorch.callbacks")
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.losses = Residual(), list[float]()

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch: Any, _: int) -> Any:  # noqa: PT019 - Lightning's name, and no test
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(glora.parameters(self), lr=0.05)


def data() -> Any:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.utils.data.TensorDataset(torch.randn(12, 6, generator=generator), torch.arange(12) % 3)
    return torch.utils.data.DataLoader(pairs, batch_size=4)


def module() -> Module:
    torch.manual_seed(0)
    return glora.apply(Module(), config=RANDOM, exclude=["head"], trainable=["head"])


def averaging() -> Any:
    return callbacks.EMAWeightAveraging(decay=0.8)


def plain_averaging() -> Any:
    return callbacks.WeightAveraging()


def checkpoints() -> Any:
    return glora.integrations.lightning.AdapterCheckpoints()


def fit(epochs: int, folder: Path, resume: Path | None = None, made: Any = (checkpoints,)) -> tuple[Module, Any]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[make() for make in made],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=len(made) > 2,
    )
    each = module()
    trainer.fit(each, data(), ckpt_path=resume)
    return each, trainer


def test_resuming_from_an_adapter_alone_gives_the_same_numbers(tmp_path: Path) -> None:
    half, trainer = fit(2, tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    written = torch.load(tmp_path / "half.ckpt", weights_only=False)
    assert written["state_dict"] == {}
    assert list(written["glora"]) == list(glora.state_dict(half))
    whole, _ = fit(4, tmp_path)
    again, again_trainer = fit(4, tmp_path, tmp_path / "half.ckpt")
    assert half.losses + again.losses == whole.losses
    expected, found = glora.state_dict(whole), glora.state_dict(again)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert again.strict_loading
    fresh = module()
    tested = again_trainer.test(fresh, data(), ckpt_path=tmp_path / "half.ckpt", verbose=False)
    assert tested == again_trainer.test(half, data(), verbose=False)


def test_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(module(), data())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match="must hold an adapter; found none"):
        fit(2, tmp_path, tmp_path / "whole.ckpt")


@pytest.mark.parametrize("average", [averaging, plain_averaging])
@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_weight_averaging_resuming_gives_the_numbers_of_whole_checkpoints(
    average: Any, ours_first: bool, tmp_path: Path
) -> None:
    def kept() -> Any:
        return callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    both = [checkpoints, average] if ours_first else [average, checkpoints]
    fit(2, tmp_path, made=[*both, kept])
    half = tmp_path / "epoch=1.ckpt"
    written = torch.load(half, weights_only=True)
    assert written["state_dict"] == written["current_model_state"] == {}
    assert list(written["glora_average"]) == list(written["glora"])
    assert any(not torch.equal(written["glora_average"][key], tensor) for key, tensor in written["glora"].items())
    whole, _ = fit(4, tmp_path, made=[average])
    again, _ = fit(4, tmp_path, half, made=both)
    assert again.losses == whole.losses[len(whole.losses) // 2 :]
    expected, found = glora.state_dict(whole), glora.state_dict(again)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    read = glora.state_dict(glora.integrations.lightning.load(module(), half))
    assert all(torch.equal(read[key], tensor) for key, tensor in written["glora_average"].items())


def test_the_modules_own_hooks_are_called_and_given_back(tmp_path: Path) -> None:
    class Hooked(Module):
        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["mine"] = 1

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            self.mine = checkpoint["mine"]

    torch.manual_seed(0)
    each = glora.apply(Hooked(), config=RANDOM)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[checkpoints()], default_root_dir=tmp_path, logger=False
    )
    trainer.fit(each, data())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert not vars(each).keys() & {"on_save_checkpoint", "on_load_checkpoint"}
    trainer.test(each, data(), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert each.mine == 1


def test_another_description_is_refused_before_anything_changes(tmp_path: Path) -> None:
    _, trainer = fit(1, tmp_path)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    torch.manual_seed(0)
    config = glora.GLoRAConfig.glora(rank=2, alpha=16, init="random")
    other = glora.apply(Module(), config=config, exclude=["head"], trainable=["head"])
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(glora.AdapterFileError, match="alpha=16.*in the model and.*alpha=None.*in the file"):
        trainer.test(other, data(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in other.state_dict().items())
    with pytest.raises(glora.AdapterFileError, match="Nothing was changed"):
        glora.integrations.lightning.load(other, tmp_path / "one.ckpt")


@pytest.mark.parametrize("strict", [True, False])
def test_load_from_checkpoint_says_what_to_call(strict: bool, tmp_path: Path) -> None:
    class Adapted(Module):
        def __init__(self) -> None:
            super().__init__()
            glora.apply(self.net, config=RANDOM, exclude=["head"], trainable=["head"])

    each = Adapted()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[checkpoints()], default_root_dir=tmp_path, logger=False
    )
    trainer.fit(each, data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(RuntimeError, match="Call glora.integrations.lightning.load"):
        Adapted.load_from_checkpoint(tmp_path / "one.ckpt", strict=strict)
    for made in (Adapted(), Module()):
        glora.integrations.lightning.load(made, tmp_path / "one.ckpt")
        found, expected = glora.state_dict(made), glora.state_dict(each)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_no_checkpoint_could_hold_is_refused_before_training(tmp_path: Path) -> None:
    each = module()
    each.net.norm.weight.requires_grad_(True)
    trainer = lightning.Trainer(accelerator="cpu", callbacks=[checkpoints()], default_root_dir=tmp_path, logger=False)
    with pytest.raises(ValueError, match="must hold everything that trains"):
        trainer.fit(each, data())
    assert each.losses == []


def test_keys_do_not_have_the_prefix_of_fabric() -> None:
    model = block()
    plain = list(model.state_dict())
    wrapped = lightning.Fabric(accelerator="cpu", devices=1).setup(glora.apply(model, config=RANDOM))
    assert list(glora.state_dict(wrapped)) == list(glora.state_dict(model))
    assert list(glora.base_state_dict(wrapped)) == plain
    x = torch.randn(3, 6)
    expected = wrapped(x)
    glora.merge(wrapped)
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-6)
