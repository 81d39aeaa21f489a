"""The grammar of `targets=`: regex, list, predicate, mapping, "all-linear"."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import LORA, chosen, refused, warned
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
        glora.plan(model, ["layers.0"])
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


class WithOutputs(Net):
    def get_output_embeddings(self) -> nn.Module | None:
        return self.head


def test_all_linear_alone_leaves_out_the_output_embeddings() -> None:
    for model in (WithOutputs(), nn.Sequential(WithOutputs())):
        planned = glora.plan(model)
        assert len(planned.layers) == 4
        (skipped,) = planned.skipped
        assert (skipped.path.endswith("head"), skipped.reason) == (True, "output embeddings")
    assert "head" in chosen(WithOutputs(), ".*")
    assert "head" in chosen(WithOutputs(), ["head"])
    assert "head" in chosen(WithOutputs(), lambda *_: True)


def test_a_tied_output_embedding_is_left_out_without_a_warning() -> None:
    model = WithOutputs()
    model.head.weight = model.embed.weight
    assert warned(lambda: glora.apply(model)) == []


def test_a_model_that_has_no_output_embeddings_may_say_so() -> None:
    class Without(Net):
        def get_output_embeddings(self) -> None:
            return None

    class Stub(Net):
        def get_output_embeddings(self) -> None:
            raise NotImplementedError

    assert chosen(Without()) == chosen(Stub()) == ALL_OF_NET


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_of_a_language_model_leaves_out_its_head(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    glora.apply(model, config=LORA)
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    projections += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = [f"model.layers.0.{path}.B.{factor}" for path in projections for factor in ("left", "right")]
    assert list(glora.state_dict(model)) == expected
    assert type(model.lm_head) is nn.Linear
