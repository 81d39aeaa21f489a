"""The grammar of `targets=`, `exclude=` and `trainable=`: regex, list, predicate, mapping, "all-linear"."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import LORA, chosen, refused
from tests.helpers.models import ALL_OF_NET, Net

# A string is a regex that matches the whole path.


def test_a_regex_matches_the_whole_path() -> None:
    assert chosen(Net(), r"layers\.\d\.q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert chosen(Net(), r".*_proj") == ALL_OF_NET[:4]
    assert chosen(Net(), "head") == ["head"]
    assert chosen(nn.Linear(2, 2), "") == [""]


def test_a_regex_that_matches_a_part_of_the_path_matches_nothing_and_a_list_is_suggested() -> None:
    refused(Net(), r"'q_proj' matches none.*list, \['q_proj'\]", "q_proj")
    refused(Net(), r"'layers' matches none that can be adapted, only ModuleList .* regex such as 'layers", "layers")


def test_a_string_that_is_no_regex_is_refused() -> None:
    refused(Net(), r"regex; '\(' is none", "(")


def test_a_regex_reaches_the_linear_layers_among_what_it_matches() -> None:
    assert chosen(Net(), ".*") == ALL_OF_NET


# A list holds suffixes of whole dotted components.


def test_a_suffix_is_of_whole_components() -> None:
    assert chosen(Net(), ["q_proj"]) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert chosen(Net(), ["0.q_proj", "head"]) == ["layers.0.q_proj", "head"]
    assert chosen(Net(), ("layers.1.k_proj",)) == ["layers.1.k_proj"]


@pytest.mark.parametrize("entry", ["proj", "_proj", "q_proj.", ".q_proj", "layer", "layers.0.q_pro", "ers.0.q_proj"])
def test_a_suffix_of_half_a_component_matches_nothing(entry: str) -> None:
    refused(Net(), re.escape(f"{entry!r} matches none"), [entry])


def test_a_suffix_is_no_regex() -> None:
    refused(Net(), re.escape("'q.proj' matches none"), ["q.proj"])


def test_every_entry_of_a_list_must_match() -> None:
    refused(Net(), "'o_proj' matches none", ["q_proj", "o_proj"])


def test_an_entry_that_matches_other_modules_alone_says_so_and_suggests_a_regex_that_works() -> None:
    model = Net()
    refused(model, "only Block", ["layers.0"])
    with pytest.raises(ValueError, match="such as") as refusal:
        glora.plan(model, ["layers.0"], config=glora.GLoRAConfig.glora())
    suggestion = re.search(r"such as '(.*)'\.", str(refusal.value))
    assert suggestion is not None
    assert chosen(model, suggestion[1].replace(r"\\", "\\")) == ["layers.0.q_proj", "layers.0.k_proj"]


# A predicate.


def test_a_predicate_sees_every_linear_layer_with_its_path_and_nothing_else() -> None:
    model, seen = Net(), dict[str, nn.Module]()

    def predicate(path: str, module: nn.Module) -> bool:
        seen[path] = module
        return path == "head"

    assert chosen(model, predicate) == ["head"]
    assert seen == {path: model.get_submodule(path) for path in ALL_OF_NET}


def test_a_predicate_that_is_never_true_is_refused() -> None:
    refused(Net(), "False for all 5", lambda _path, _module: False)


def test_a_predicate_may_look_at_the_module() -> None:
    def wide(_path: str, module: nn.Module) -> bool:
        return module.out_features == 10

    assert chosen(Net(), wide) == ["head"]


# A mapping from regex to config.


def test_the_first_pattern_of_a_mapping_that_matches_gives_the_config() -> None:
    small, large = GLoRAConfig.lora(rank=1), GLoRAConfig.lora(rank=3)
    planned = glora.plan(Net(), {r"layers\.0\..*": large, r".*\.q_proj": small, "head": GLoRAConfig.ssf()})
    assert {layer.path: layer.config for layer in planned.layers} == {
        "layers.0.q_proj": large,
        "layers.0.k_proj": large,
        "layers.1.q_proj": small,
        "head": GLoRAConfig.ssf(),
    }
    assert {layer.path: layer.rank for layer in planned.layers}["head"] is None


def test_the_keys_of_a_mapping_are_regexes_for_the_whole_path() -> None:
    refused(Net(), r"'q_proj' matches none", {"q_proj": LORA})


def test_a_key_of_a_mapping_that_matches_nothing_is_refused() -> None:
    refused(Net(), "'tail' matches none", {"head": LORA, "tail": LORA})


def test_a_key_of_a_mapping_that_is_wholly_shadowed_is_refused() -> None:
    refused(Net(), r"'head' matches \(head\) is taken by an earlier one", {".*": LORA, "head": LORA})
    two = {r".*\.q_proj": LORA, r".*\.k_proj": LORA, r"layers\..*": LORA}
    refused(Net(), "taken by an earlier one", two)


def test_a_config_beside_a_mapping_is_refused() -> None:
    refused(Net(), "config= was given beside it", {"head": LORA}, LORA)


NO_TARGETS = [{}, {"head": None}, {"head": {"B": "lora"}}, {3: LORA}, [], [""], [3], [None], [nn.Linear(2, 2)]]


@pytest.mark.parametrize("targets", [*NO_TARGETS, 3, None, nn.ReLU()], ids=str)
def test_targets_of_another_kind_are_refused(targets: Any) -> None:
    refused(Net(), "targets=", targets)


def test_a_config_of_another_kind_is_refused() -> None:
    refused(Net(), "config=", "all-linear", {"B": "lora"})


# "all-linear".


def test_all_linear_is_the_default_and_reaches_every_linear_layer() -> None:
    class Own(nn.Linear):
        pass

    model = Net()
    model.own = Own(2, 2)
    assert chosen(model) == chosen(model, "all-linear") == [*ALL_OF_NET, "own"]
    assert chosen(nn.Linear(2, 2)) == [""]
    refused(nn.Sequential(nn.ReLU()), "at least one layer")


# `exclude=` and `trainable=` take the same grammar, and win over targets.


@pytest.mark.parametrize(
    "exclude",
    ["head", ["head"], lambda path, _module: path == "head", r"he.*"],
    ids=["regex", "list", "predicate", "wild regex"],
)
@pytest.mark.parametrize("targets", ["all-linear", ".*", ["q_proj", "k_proj", "head"], lambda *_: True, {".*": LORA}])
def test_exclude_takes_the_same_grammar_and_wins_over_targets(targets: Any, exclude: Any) -> None:
    planned = glora.plan(Net(), targets, exclude=exclude)
    assert [layer.path for layer in planned.layers] == ALL_OF_NET[:4]
    assert [(skipped.path, skipped.reason) for skipped in planned.skipped] == [("head", "excluded")]


def test_exclude_refuses_what_matches_nothing() -> None:
    refused(Net(), r"exclude= .*'tail' matches none", exclude=["tail"])
    refused(Net(), r"exclude= .*'q_proj' matches none.*list", exclude="q_proj")
    refused(Net(), r"exclude= .*only Block", exclude=["layers.0"])
    refused(Net(), r"exclude= .*False for all", exclude=lambda *_: False)
    refused(Net(), r"exclude=", exclude={"head": LORA})


def test_excluding_every_target_leaves_nothing_to_train() -> None:
    refused(Net(), "something to train.*excluded", ["head"], exclude=["head"])
    refused(Net(), "something to train", exclude="all-linear")


def heads(model: nn.Module, trainable: Any) -> list[str]:
    return [
        head.path
        for head in glora.plan(model, ["layers.0.q_proj"], trainable=trainable, config=glora.GLoRAConfig.glora()).heads
    ]


def test_trainable_takes_the_same_grammar_over_all_modules_and_modules_themselves() -> None:
    model = Net()
    assert heads(model, ["norm"]) == ["layers.0.norm", "layers.1.norm"]
    assert heads(model, r"layers\.1\.norm|head") == ["layers.1.norm", "head"]
    assert heads(model, lambda _path, module: isinstance(module, nn.Embedding)) == ["embed"]
    assert heads(model, model.head) == ["head"]
    assert heads(model, [model.head, "embed"]) == ["embed", "head"]
    assert heads(model, ["layers.1"]) == ["layers.1.q_proj", "layers.1.k_proj", "layers.1.norm"]


def test_trainable_wins_over_targets() -> None:
    model = Net()
    planned = glora.plan(model, ["q_proj", "head"], trainable=["head"], config=glora.GLoRAConfig.glora())
    assert [layer.path for layer in planned.layers] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert [(skipped.path, skipped.reason) for skipped in planned.skipped] == [("head", "trainable as a whole")]
    glora.apply(model, ["q_proj", "head"], trainable=["head"], config=glora.GLoRAConfig.glora())
    assert [key for key in glora.state_dict(model) if key.startswith("head")] == ["head.weight", "head.bias"]


def test_trainable_refuses_what_it_cannot_train() -> None:
    model = Net()
    refused(model, r"trainable= .*'tail' matches none", trainable=["tail"])
    refused(model, r"trainable= .*'norm' matches none.*list", trainable="norm")
    refused(model, r"trainable= .*False for all", trainable=lambda *_: False)
    refused(model, r"trainable= .*'act' has none", trainable=["act"])
    refused(model, r"trainable= .*outside it", trainable=nn.Linear(4, 10))
    refused(model, r"trainable= .*outside it", trainable=[model.head, nn.Linear(4, 10)])
    refused(model, r"trainable=", trainable=3)
    refused(model, r"trainable=", trainable=[3])


# What is misspelt.


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("q_porj", "q_proj"), ("qproj", "q_proj"), ("layers.0.q_prjo", r"layers\.0\.q_proj"), ("haed", "head")],
)
def test_the_nearest_paths_are_named_first(wrong: str, near: str) -> None:
    for targets in ([wrong], wrong):
        refused(Net(), rf"{re.escape(wrong)!s}.* There are: \S*{near}", targets)
    refused(Net(), "There are: embed, layers.0.q_proj, .*head", ["zzzz"])
