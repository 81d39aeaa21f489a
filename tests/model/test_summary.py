"""`glora.summary`: a row for each adapter on each module, and the counts of the whole model."""

from __future__ import annotations

import pytest
from hypothesis import given
from torch import nn

import glora
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import build, two
from tests.helpers.strategies import Case, cases


@given(cases())
def test_its_rows_say_what_was_attached_and_count_what_trains(case: Case) -> None:
    layer = case.build()
    summary = glora.summary(layer)
    assert {row.adapter for row in summary.rows} == set(glora.adapters(layer))
    base = sum(tensor.numel() for tensor in glora.base_state_dict(layer).values())
    for row in summary.rows:
        config = case.configs[list(case.named_weights).index(row.adapter)]
        own = list(glora.parameters(layer, row.adapter))
        paths = dict.fromkeys(key.split(".")[0] for key in glora.state_dict(layer, row.adapter))
        assert (row.path, row.forms) == ("", " ".join(f"{path}={config.forms[path]}" for path in paths))
        assert row.rank == (config.rank if "lora" in row.forms else None)
        assert row.trainable == sum(parameter.numel() for parameter in own if parameter.requires_grad)
        assert row.total >= base + sum(parameter.numel() for parameter in own)
    assert summary.trainable == sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert summary.total == sum(p.numel() for p in layer.parameters())


def test_a_head_stands_as_a_whole_and_an_adapter_that_rests_trains_nothing() -> None:
    model = build()
    two(model)
    rows = {(row.path, row.adapter): row for row in glora.summary(model).rows}
    assert rows["head", "a"].forms == rows["head", "b"].forms == "trainable"
    assert rows["head", "a"].rank is None
    assert rows["head", "b"].trainable == model.head.weight.numel() + model.head.bias.numel()
    assert {row.trainable for (_, name), row in rows.items() if name == "a"} == {0}


def test_a_plain_model_has_no_rows_and_its_own_counts() -> None:
    summary = glora.summary(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    assert (summary.rows, summary.trainable, summary.total) == ((), 23, 23)
    assert "not reached" not in str(summary)


def test_what_it_reaches_is_what_the_plan_said() -> None:
    model = build()
    planned = glora.plan(model, ["first"], RANDOM, trainable=["head"])
    assert glora.summary(model).coverage.share == 0.0
    attach(model, targets=["first"], trainable=["head"])
    assert glora.summary(model).coverage == planned.coverage
    assert str(planned.coverage) in str(glora.summary(model))


def test_a_notebook_shows_the_same_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    blocks = [nn.ModuleDict({"attention_of_the_first_kind": nn.ModuleDict({"query": nn.Linear(4, 4)})})]
    model = nn.ModuleDict({"encoder_with_a_long_name": nn.ModuleList(blocks)})
    plan = glora.plan(model, config=glora.GLoRAConfig.glora())
    summary = glora.summary(glora.apply(model, config=glora.GLoRAConfig.glora()))
    (row,) = summary.rows
    for said in (plan, summary):
        assert f"<td>{row.path}</td>" in said._repr_html_()
        assert f"<td>{row.forms}</td>" in said._repr_html_()
        assert max(map(len, str(said).splitlines())) <= 80
        assert str(said).splitlines()[0] in said._repr_html_().replace("&#x27;", "'")
