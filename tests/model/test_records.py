"""What a plan says of itself: rows, heads, and the share of the model that is covered."""

from __future__ import annotations

import re

from torch import nn

import glora
from glora import GLoRAConfig
from glora.model.records import coverage, plan_heads
from glora.model.walk import owners, sites
from tests.helpers.models import ALL_OF_NET, Net


def test_a_plan_prints_every_layer_head_and_skipped_layer() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    planned = glora.plan(model, config=GLoRAConfig.glora(rank=2), exclude=["1.k_proj"], trainable=["0.norm"])
    lines = str(planned).splitlines()
    assert re.search(r"'default'.* 3 layers, ", lines[0])
    assert lines[-1] == "reaches 75% of 64 numbers in weight matrices; not reached: Linear.weight 25%"
    cells = {line.split()[0]: line for line in lines[2:-1]}
    assert set(cells) == {*ALL_OF_NET, "layers.0.norm"}
    assert re.search(r"A=lora B=lora C=vector D=vector E=vector +2 +\d+$", cells["layers.0.q_proj"])
    assert "skipped: excluded" in cells["layers.1.k_proj"]
    assert "tied" in cells["head"]
    assert re.search(r"trainable +- +8$", cells["layers.0.norm"])


def test_every_matrix_counts_once_and_embeddings_not_at_all() -> None:
    model = Net()
    walk = owners(model)
    matrices = {(id(o.module), "weight"): o.module.weight for o in walk if isinstance(o.module, nn.Linear)}
    sizes = {key: weight.numel() for key, weight in matrices.items()}
    assert coverage(walk, sites(walk), [], []).total == sum(sizes.values())
    reached = 0
    for count in range(len(sizes) + 1):
        found = coverage(walk, sites(walk), list(sizes)[:count], [])
        assert (found.reached, found.total) == (sum(list(sizes.values())[:count]), sum(sizes.values()))
        assert found.share >= reached
        reached = found.share
        assert sum(size for _, size in found.rest) == found.total - found.reached
    model.layers[0].q_proj.weight = model.layers[1].q_proj.weight
    assert coverage(owners(model), sites(owners(model)), [], []).total == sum(sizes.values()) - 16
    outputs = [id(model.head)]
    assert (
        coverage(owners(model), sites(owners(model)), [], outputs).total
        == sum(sizes.values()) - 16 - model.head.weight.numel()
    )


def test_a_model_without_matrices_is_reached_as_a_whole() -> None:
    found = coverage(owners(nn.LayerNorm(4)), sites(owners(nn.LayerNorm(4))), [], [])
    assert (found.share, found.rest) == (1.0, ())


def test_what_is_left_out_is_named_by_kind_the_largest_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 9, 3), nn.Linear(2, 3), nn.Bilinear(1, 1, 1))
    found = coverage(owners(model), sites(owners(model)), [], [])
    assert found.rest == (("Conv1d.weight", 54), ("Linear.weight", 10), ("Bilinear.weight", 1))
    assert str(found) == (
        "reaches 0% of 65 numbers in weight matrices; not reached: Conv1d.weight 83%, "
        "Linear.weight 15%, Bilinear.weight 2%"
    )


def test_a_parameter_in_two_heads_is_copied_once_and_read_in_all_places() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    walk = owners(model)
    by_path = {owner.path: owner for owner in walk}
    embed, head = plan_heads(walk, [by_path["embed"], by_path["head"]])
    assert (embed.names, head.names) == (("weight",), ("bias",))
    assert [(owner.path, name) for owner, name in embed.places] == [("head", "weight")]
    assert (embed.parameters, head.parameters) == (40, 10)
    assert plan_heads(walk, [by_path["act"]]) == []
