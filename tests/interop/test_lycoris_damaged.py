"""Strangers' files of kohya's and LyCORIS's: damaged or forged ones are AdapterFileErrors, and nothing has changed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.files import damages, misshapen
from tests.helpers.state import snapshot

pytest.importorskip("lycoris", reason="the extra `interop` brings it")

from tests.helpers.lycoris import Case, Holder

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

DORA: dict[str, Any] = {"weight_decompose": True, "use_tucker": True}
CASES = {
    "lora": Case("lora", "conv2d 3x3", (4, 6), 2, 1.0, True, 0, DORA),
    "lora of a linear layer": Case("lora", "linear", (4, 6), 2, 1.0, True, 0),
    "loha": Case("loha", "conv2d 3x3", (4, 6), 2, 1.0, True, 0, DORA),
    "lokr": Case("lokr", "conv2d 3x3", (8, 8), 1, 1.0, True, 0, {**DORA, "decompose_both": True}),
    "lokr, whole": Case("lokr", "linear", (8, 8), 4, 1.0, True, 0),
    "glora": Case("glora", "conv2d 3x3", (4, 6), 2, 1.0, True, 0),
    "ia3": Case("ia3", "conv2d 3x3", (4, 6), 2, 1.0, True, 0),
    "full": Case("full", "linear", (4, 6), 2, 1.0, True, 0),
}


def forged(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """One of many ways in which tensors may be other than LyCORIS's."""
    tensors, key = dict(tensors), rng.choice(sorted(tensors))
    tensor, kind, part = tensors[key], rng.randrange(10), key.partition(".")[2]
    at = rng.randrange(max(tensor.ndim, 1))
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[rng.choice([f"{key}x", f"x{key}", key.replace(".", ""), f"lycoris_in_blocks_7.{part}"])] = tensors.pop(
            key
        )
    elif kind == 2:
        tensors[f"lycoris_in_blocks_0.{rng.choice(['dora_scale', 'lora_mid.weight', 'oft_blocks', 'diff_b', 'x'])}"] = (
            tensor
        )
    elif 3 <= kind <= 6:
        tensors[key] = misshapen(tensor, kind - 3, at, 100_000, rng)
    elif kind == 7:
        tensors[key] = (
            torch.full_like(tensor, rng.choice([torch.nan, torch.inf, -1, 0])) if tensor.is_floating_point() else tensor
        )
    elif kind == 8:
        tensors = {key: tensors[key]}
    else:
        tensors["lycoris_norm.w_norm"] = torch.ones(rng.choice([(6,), (5,), (), (6, 1)]))
    return {key: tensor.clone() for key, tensor in tensors.items()}


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.in_blocks, self.norm = case.model().in_blocks, nn.LayerNorm(6)


def error_of_loading(model: nn.Module, file: Path) -> str | None:
    try:
        interop.load_lycoris(model, file)
    except glora.AdapterFileError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CASES)
def test_200_damaged_files_are_adapter_file_errors_and_nothing_has_changed(name: str, tmp_path: Path) -> None:
    case, rng, seen = CASES[name], random.Random(7), 0
    good, other = case.tensors(), CASES["loha" if name != "loha" else "glora"].tensors()
    for number in range(200):
        file = tmp_path / f"{number}.{'pt' if rng.random() < 0.2 else 'safetensors'}"
        if rng.random() < 0.3:
            file.write_bytes(damages(save(good), save(other), b"{}", rng))
        elif file.suffix == ".pt":
            torch.save(forged(good, rng), file)
        else:
            save_file(forged(good, rng), file)
        model = Model(case)
        before = snapshot(model)
        error = error_of_loading(model, file)
        file.unlink()
        if error is not None:
            seen += 1
            assert str(file) in error
            assert snapshot(model) == before
    assert seen > 80, seen


@pytest.mark.parametrize(
    "tensors",
    [
        {"lokr_w1": torch.ones(1, 10**7), "lokr_w2": torch.ones(1, 1)},
        {"lokr_w1_a": torch.ones(10**6, 1), "lokr_w1_b": torch.ones(1, 10**6), "lokr_w2": torch.ones(1, 1)},
        {f"hada_w{n}_{x}": torch.ones((10**6, 1) if x == "a" else (1, 10**6)) for n in (1, 2) for x in "ab"},
        {"lora_up.weight": torch.ones(10**6, 1), "lora_down.weight": torch.ones(1, 10**6), "dora_scale": torch.ones(1)},
        {"diff": torch.ones(1, 10**7)},
        {
            "a1.weight": torch.ones(10**6, 1),
            "a2.weight": torch.ones(1, 10**6),
            "b1.weight": torch.ones(1, 1),
            "b2.weight": torch.ones(1, 1),
        },
        {"weight": torch.ones(10**7), "on_input": torch.tensor(1)},
    ],
)
def test_sizes_are_compared_before_anything_of_them_is_made(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({f"lycoris_in_blocks_0.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(glora.AdapterFileError, match="wrong shape"):
        interop.load_lycoris(Holder(nn.Linear(4, 3)), tmp_path / "a.safetensors")


def test_a_file_of_torch_save_runs_no_code_and_claims_no_numbers_that_it_has_not(tmp_path: Path) -> None:
    ran: list[int] = []

    class Evil:
        def __reduce__(self) -> Any:
            return ran.append, (1,)

    torch.save({"lycoris_in_blocks_0.diff": Evil()}, tmp_path / "evil.pt")
    torch.save({"lycoris_in_blocks_0.diff": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "large.pt")
    for name in ("evil.pt", "large.pt"):
        with pytest.raises(glora.AdapterFileError, match=name):
            interop.load_lycoris(Holder(nn.Linear(4, 3)), tmp_path / name)
    assert not ran
