"""benchmarks.device: rehearsed on a CPU at tiny sizes; its checks find faults, and it ends in time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import device, report
from benchmarks.device import CHECKS, MODES, Task, check, run_all, tasks_of
from glora.kernels import blockwise, factored, row_blocks, samplewise
from tests.helpers import internals


# torch's own, where a compiled block's input is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.long
def test_the_whole_run_at_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["device", "--device", "cpu", "--quick", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    # Each peak is a process of its own, which imports everything anew.
    monkeypatch.setattr(device, "peak_of_step", lambda *_: {"peak_whole_MiB": 2.0})
    device.main()
    rows = report.read_csv(tmp_path / "device-cpu.csv")
    assert {row["part"] for row in rows} == {"correctness", "step", "memory", "decoding"}
    assert not [row for row in rows if row["note"] or not float(row["value"]) > 0]
    checked = [(row["of"], row["mode"]) for row in rows if row["part"] == "correctness" and row["how"] == "eager"]
    assert checked == [(name, mode) for name in CHECKS for mode in MODES]
    assert {row["how"] for row in rows if row["part"] == "step"} == {"eager", "aot_eager"}
    assert {row["mode"] for row in rows if row["part"] in ("step", "memory")} == {"bfloat16"}


# Name of the check to the function that it is to go through.
THROUGH: dict[str, Any] = {
    "factored": factored,
    "blockwise": blockwise,
    "expanded": factored,
    "samplewise": samplewise,
    "row blocks": row_blocks,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_takes_the_kernel_that_it_names_and_finds_a_fault_in_it(name: str) -> None:
    kernel = name.partition(",")[0]
    room, function = THROUGH[kernel], {"row blocks": "multiply", "factored": "fused"}.get(kernel, "linear")
    mode = "bfloat16" if kernel == "row blocks" else "float32"
    right, called = getattr(room, function), list[object]()

    def wrong(*given: Any, **named: Any) -> Any:
        called.append(None)
        return right(*given, **named) * (1.5 if mode == "bfloat16" else 1.0001)

    with internals.kernels_taken() as taken:
        assert check(name, mode, "cpu")["ok"] == "yes"
    assert set(taken) <= {kernel if kernel in ("blockwise", "expanded") else "factored"}
    with mock.patch.object(room, function, wrong):
        assert check(name, mode, "cpu")["ok"] == "no"
    assert called


@pytest.mark.parametrize("mode", MODES)
def test_a_check_finds_a_fault_in_a_gradient(mode: str) -> None:
    right = device.F.linear

    def wrong(*given: Any) -> Any:  # the outputs are as they were
        y = right(*given)
        return y * 1.1 - (0.1 * y).detach()

    with mock.patch.object(device.F, "linear", wrong):
        assert check("blockwise", mode, "cpu")["ok"] == "no"


def counted(cost: float) -> tuple[Callable[[], float], Callable[[float], list[Any]]]:
    now = [0.0]

    def run(_: float) -> list[Any]:
        now[0] += cost
        return [{"note": ""}]

    return lambda: now[0], run


@pytest.mark.parametrize(("seconds", "done"), [(100.0, 6), (35.0, 3), (5.0, 0)])
def test_what_would_not_fit_is_not_begun_and_has_a_row(seconds: float, done: int) -> None:
    clock, run = counted(cost=10.0)
    rows = run_all([Task("step", {"of": "it"}, run, guess=8.0)] * 6, seconds, clock=clock)
    assert [row["note"] for row in rows] == [""] * done + ["no time left"] * (6 - done)
    assert clock() <= seconds


def test_an_error_is_a_row_and_the_rest_is_run() -> None:
    def fails(_: float) -> list[Any]:
        raise torch.OutOfMemoryError("no room\nfor more")

    _, run = counted(1.0)
    first, second = run_all([Task("a", {"of": "it"}, fails, 0.0), Task("b", {}, run, 0.0)], 60.0)
    assert (first["of"], first["ok"], first["note"]) == ("it", "no", "OutOfMemoryError: no room")
    assert second == {"note": ""}


def test_each_task_of_the_real_run_is_its_own_and_says_what_it_is() -> None:
    tasks, found = tasks_of("cuda", quick=False), list[Any]()

    def prepare(_name: str, size: Any, _device: str) -> Callable[[], object]:
        found.append(size)
        return list

    def peak(_module: str, _name: str, size: Any, *_: object) -> dict[str, float]:
        found.append(vars(size))
        return {"peak_whole_MiB": 1.0}

    with (
        mock.patch.object(device, "prepare_step", prepare),
        mock.patch.object(device, "peak_of_step", peak),
        mock.patch.object(device, "interleaved", lambda calls, **_: dict.fromkeys(calls, device_timing())),
    ):
        for task in tasks:
            if task.row["part"] in ("step", "memory"):
                for row in task.run(1.0):
                    assert task.row.items() >= {(k, row[k]) for k in ("part", "of", "mode", "how")}
                    size = found[-1]
                    assert row["of"] == f"{size['layers']} layers of {size['hidden']}"
                    assert (row["mode"], row["how"]) == (size["mode"], size["blocks"] or "eager")
    steps = {(t.row["of"], t.row["mode"], t.row["how"]) for t in tasks if t.row["part"] == "step"}
    hows, modes = ("eager", "default", "reduce-overhead"), ("float32", "bfloat16", "autocast")
    sizes = ("12 layers of 1024", "8 layers of 4096")
    assert steps == {(of, mode, how) for of in sizes for mode in modes for how in hows}


def device_timing() -> Any:
    return mock.Mock(median=1.0, ratio=lambda _: (0.9, 1.0, 1.1))
