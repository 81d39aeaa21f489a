"""studies.store: runs read as written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from studies.store import Store


@dataclass(frozen=True)
class Run:
    method: str
    seed: int
    lr: float


WORDS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)
FLOATS = st.floats(1e-6, 1e6).map(lambda x: float(f"{x:.6g}"))


@given(runs=st.lists(st.builds(Run, WORDS, st.integers(0, 99), FLOATS)))
def test_runs_read_as_written_by_two_and_lose_the_line_that_was_cut_off(
    tmp_path_factory: Path, runs: list[Run]
) -> None:
    path = tmp_path_factory.mktemp("store") / "runs.csv"
    stores = Store(path, Run, "about"), Store(path, Run, "others")
    for number, run in enumerate(runs):
        stores[number % 2].add(run)
    assert stores[1].read() == runs
    with path.open("a") as file:
        file.write("LoRA,1,0.0")
    assert Store(path, Run, "about").read() == runs
    assert path.read_text().startswith("# about\n")
