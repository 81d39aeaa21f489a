"""benchmarks.route: what is timed side by side computes the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import route
from benchmarks.route import LOOP, kinds


def test_a_batch_of_five_kinds_is_what_a_loop_over_pefts_adapters_computes() -> None:
    torch.manual_seed(0)
    calls = kinds(width=16, batch=12, tokens=3, rank=2, device="cpu")
    ours, theirs, base = calls["glora, routed"](), calls[LOOP](), calls["the base alone"]()
    change = theirs - base
    assert (change[:10].flatten(1).norm(dim=1) > 0.01 * base[:10].flatten(1).norm(dim=1)).all()  # by every adapter
    torch.testing.assert_close(ours - base, change, rtol=1e-4, atol=1e-4 * change.abs().max().item())
    torch.testing.assert_close(ours[10:], base[10:])


def test_another_computation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    route_of = route.glora.route
    monkeypatch.setattr(route.glora, "route", lambda model, names: route_of(model, names[::-1]))
    with pytest.raises(AssertionError):
        kinds(width=16, batch=12, tokens=3, rank=2, device="cpu")
