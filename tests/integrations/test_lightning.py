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


def fit(epochs: int, folder: Path, resume: Path | None = None) -> tuple[Module, Any]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[glora.integrations.lightning.AdapterCheckpoints()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
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
