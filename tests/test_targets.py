"""From `targets=`, `exclude=` and `trainable=` to modules: the grammar, what cannot be adapted, and what plan says."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.two_tensor import TwoTensor

import glora
from glora import GLoRAConfig

LORA = GLoRAConfig.lora(rank=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.k_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 10)


class Shared(nn.Module):
    """One linear layer that two paths reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.other = nn.Linear(4, 4)


class Pair(nn.Module):
    """A layer that is fit to be adapted, and one that a test makes unfit."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.good = nn.Linear(4, 4)
        self.bad = nn.Linear(4, 4, bias=bias)


ALL_OF_NET = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj", "head"]


def contents(tensor: Tensor) -> object:
    """The bytes of a tensor, where it has any."""
    if is_lazy(tensor) or tensor.is_meta or isinstance(tensor, TwoTensor):
        return None
    return tensor.detach().cpu().flatten().view(torch.uint8).tolist()


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that an adapter could change of a model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {
        "types": {path: type(module) for path, module in modules.items()},
        "attributes": {path: list(vars(module)) for path, module in modules.items()},
        "keys": list(model.state_dict()),
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "flags": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "values": {name: contents(tensor) for name, tensor in tensors.items()},
    }


@contextmanager
def unchanged(model: nn.Module) -> Generator[None]:
    """Nothing in the model changes inside the `with` block."""
    before = snapshot(model)
    yield
    assert snapshot(model) == before


def refused(model: nn.Module, match: str, *args: Any, **kwargs: Any) -> None:
    """`apply` and `plan` raise the same ValueError, and nothing has changed."""
    with unchanged(model):
        with pytest.raises(ValueError, match=match) as by_plan:
            glora.plan(model, *args, **kwargs)
        with pytest.raises(ValueError, match=match) as by_apply:
            glora.apply(model, *args, **kwargs)
    assert str(by_plan.value) == str(by_apply.value)


def chosen(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    return [layer.path for layer in glora.plan(model, *args, **kwargs).layers]


def warned(call: Callable[[], object]) -> list[str]:
    """The warnings of a call, as text."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record]


# A string is a regex that matches the whole path.


def test_a_regex_matches_the_whole_path() -> None:
    assert chosen(Net(), r"layers\.\d\.q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert chosen(Net(), r".*_proj") == ALL_OF_NET[:4]
    assert chosen(Net(), "head") == ["head"]
    assert chosen(nn.Linear(2, 2), "") == [""]


def test_a_regex_that_matches_a_part_of_the_path_matches_nothing_and_a_list_is_suggested() -> None:
    refused(Net(), r"'q_proj' matches none.*list, \['q_proj'\]", "q_proj")
    refused(Net(), r"'layers' matches no nn\.Linear", "layers")


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


# exclude= wins over targets=.


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


# trainable= wins over targets=.


def heads(model: nn.Module, trainable: Any) -> list[str]:
    return [head.path for head in glora.plan(model, ["layers.0.q_proj"], trainable=trainable).heads]


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
    planned = glora.plan(model, ["q_proj", "head"], trainable=["head"])
    assert [layer.path for layer in planned.layers] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert [(skipped.path, skipped.reason) for skipped in planned.skipped] == [("head", "trainable as a whole")]
    glora.apply(model, ["q_proj", "head"], trainable=["head"])
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


def test_a_tied_head_is_refused() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    refused(model, "'head' is not: .*tied to embed.weight.*untie", ["q_proj"], trainable=["head"])
    refused(model, "'embed' is not: .*tied to head.weight.*untie", ["q_proj"], trainable=["embed"])


def test_a_parametrized_or_lazy_head_is_refused() -> None:
    model = Net()
    parametrizations.weight_norm(model.head)
    refused(model, "'head' is not: .*parametrized", ["q_proj"], trainable=["head"])
    model.head = nn.LazyLinear(10)
    refused(model, "'head' is not: .*lazy.*one batch", ["q_proj"], trainable=["head"])


# "all-linear".


def test_all_linear_is_the_default_and_reaches_every_linear_layer() -> None:
    class Own(nn.Linear):
        pass

    model = Net()
    model.own = Own(2, 2)
    assert chosen(model) == chosen(model, "all-linear") == [*ALL_OF_NET, "own"]
    assert chosen(nn.Linear(2, 2)) == [""]
    refused(nn.Sequential(nn.ReLU()), "at least one nn.Linear")


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


# One module reached by two paths.


@pytest.mark.parametrize("targets", [["first"], ["second"], "first", "second", ["first", "second"], {"second": LORA}])
def test_a_shared_module_counts_once_and_answers_to_both_of_its_paths(targets: Any) -> None:
    model = Shared()
    assert chosen(model, targets) == ["first"]
    assert chosen(model, lambda path, _module: path == "second") == ["first"]
    glora.apply(model, targets, None if isinstance(targets, dict) else LORA)
    assert list(glora.state_dict(model)) == ["first.B.left", "first.B.right"]
    assert model.first is model.second


def test_a_shared_module_is_excluded_and_trained_under_either_path() -> None:
    for path in ("first", "second"):
        assert chosen(Shared(), exclude=[path]) == ["other"]
        assert [head.path for head in glora.plan(Shared(), ["other"], trainable=[path]).heads] == ["first"]


def test_a_shared_module_is_no_tie() -> None:
    assert chosen(Shared()) == ["first", "other"]
    assert warned(lambda: glora.apply(Shared())) == []


# Ties.


def tie_by_identity(model: Net) -> None:
    model.head.weight = model.embed.weight


def tie_by_storage(model: Net) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.detach())


def tie_by_overlap(model: Net) -> None:
    rows = torch.randn(15, 4, device=model.head.weight.device)
    model.embed.weight, model.head.weight = nn.Parameter(rows[:10]), nn.Parameter(rows[5:])


def tie_to_a_buffer(model: Net) -> None:
    model.embed = nn.Module()
    model.embed.register_buffer("weight", model.head.weight.detach()[2:])


TIES = [tie_by_identity, tie_by_storage, tie_by_overlap, tie_to_a_buffer]


def tied(how: Callable[[Net], None], device: str) -> Net:
    with torch.device(device):
        model = Net()
        how(model)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", TIES)
@pytest.mark.parametrize(
    "targets", [["head"], {"head": GLoRAConfig()}, ["q_proj", "head"]], ids=["list", "mapping", "two"]
)
def test_a_tied_layer_that_is_named_is_refused(targets: Any, how: Callable[[Net], None], device: str) -> None:
    refused(tied(how, device), r"'head' is not: .*tied to embed\.weight.*untie", targets)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", TIES)
@pytest.mark.parametrize("targets", [".*", lambda *_: True, "all-linear"], ids=["regex", "predicate", "all-linear"])
def test_a_tied_layer_that_is_swept_in_is_skipped_with_one_warning(
    targets: Any, how: Callable[[Net], None], device: str
) -> None:
    model = tied(how, device)
    planned = glora.plan(model, targets)
    assert [layer.path for layer in planned.layers] == ALL_OF_NET[:4]
    (skipped,) = planned.skipped
    assert (skipped.path, skipped.unfit) == ("head", True)
    assert re.search(r"tied to embed\.weight.*untie", skipped.reason)
    assert skipped.reason in str(planned)
    weight = model.head.weight
    (message,) = warned(lambda: glora.apply(model, targets))
    assert re.search(r"^1 of .*'head'.*tied to embed\.weight.*untie", message)
    assert model.head.weight is weight
    assert not any(key.startswith("head") for key in glora.state_dict(model))


def test_a_tied_bias_is_found() -> None:
    model = Pair()
    model.bad.bias = model.good.bias
    refused(model, "'bad' is not: its bias is tied to good.bias", ["bad"])


def test_a_tie_among_the_targets_skips_all_that_are_tied() -> None:
    model = Net()
    model.layers[0].k_proj.weight = model.layers[1].k_proj.weight = model.layers[0].q_proj.weight
    (message,) = warned(lambda: glora.apply(model, "all-linear", LORA))
    assert message.startswith("3 of ")
    assert {key.rpartition(".B")[0] for key in glora.state_dict(model)} == {"layers.1.q_proj", "head"}


def test_a_tied_layer_that_is_excluded_needs_no_word() -> None:
    model = tied(tie_by_identity, "cpu")
    assert warned(lambda: glora.apply(model, ["q_proj", "head"], exclude=["head"])) == []
    model = tied(tie_by_identity, "cpu")
    assert warned(lambda: glora.apply(model, exclude=["head"])) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "views",
    [
        lambda fused: (fused[:4], fused[4:, :4]),
        lambda fused: (fused[:4, :4], fused[:4, 4:]),  # GPT-2's fused qkv, (in, 3 * out), is cut along columns
        lambda fused: (fused[::2, :4], fused[1::2, :4]),
    ],
    ids=["rows", "columns", "every other row"],
)
def test_disjoint_views_of_one_storage_are_not_tied(
    views: Callable[[Tensor], tuple[Tensor, Tensor]], device: str
) -> None:
    model = Pair()
    good, bad = views(torch.randn(8, 8, device=device))
    model.good.weight, model.bad.weight = nn.Parameter(good), nn.Parameter(bad)
    assert chosen(model) == ["good", "bad"]
    assert chosen(model, ["good", "bad"]) == ["good", "bad"]


def test_a_tie_is_still_seen_under_an_adapter_that_is_attached() -> None:
    model = Net()
    glora.apply(model, ["head"], LORA)
    model.embed.weight = nn.Parameter(model.head.parametrizations.weight.original.detach())
    refused(model, r"'head' is not: .*tied to embed\.weight", ["head"], LORA, name="second")


# What else cannot be adapted.


def lazy(model: Pair) -> None:
    model.bad = nn.LazyLinear(4)


def integers(model: Pair) -> None:
    model.bad.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def eight_bit_floats(model: Pair) -> None:
    model.bad.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)


def wrapped_tensor(model: Pair) -> None:
    """As torchao's quantised and DTensor's sharded weights are."""
    model.bad.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))


def weight_norm(model: Pair) -> None:
    parametrizations.weight_norm(model.bad)


def older_weight_norm(model: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.bad)


def older_spectral_norm(model: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model.bad)


def pruned_weight(model: Pair) -> None:
    prune.l1_unstructured(model.bad, "weight", amount=0.5)


def pruned_bias(model: Pair) -> None:
    prune.l1_unstructured(model.bad, "bias", amount=0.5)


UNFIT: dict[Callable[[Pair], None], str] = {
    lazy: "lazy.*run one batch",
    integers: "int8.*quantised.*float copy",
    eight_bit_floats: "float8.*quantised.*float copy",
    wrapped_tensor: "TwoTensor.*before it is quantised",
    weight_norm: "parametrized by something else.*remove",
    older_weight_norm: "weight_norm.*undo",
    older_spectral_norm: "no parameter.*undo",
    pruned_weight: "pruning.*undo",
    pruned_bias: "prun.*undo",
}


@pytest.mark.parametrize("how", UNFIT)
@pytest.mark.parametrize("targets", [["bad"], ["good", "bad"], {"bad": GLoRAConfig()}], ids=["list", "two", "mapping"])
def test_an_unfit_layer_that_is_named_is_refused_with_what_to_do(targets: Any, how: Callable[[Pair], None]) -> None:
    model = Pair()
    how(model)
    refused(model, f"'bad' is not: .*{UNFIT[how]}", targets)


@pytest.mark.parametrize("how", UNFIT)
@pytest.mark.parametrize("targets", [".*", lambda *_: True, "all-linear"], ids=["regex", "predicate", "all-linear"])
def test_an_unfit_layer_that_is_swept_in_is_skipped_with_one_warning(targets: Any, how: Callable[[Pair], None]) -> None:
    model = Pair()
    how(model)
    (skipped,) = glora.plan(model, targets).skipped
    assert (skipped.path, skipped.unfit) == ("bad", True)
    with unchanged(model.bad):
        (message,) = warned(lambda: glora.apply(model, targets, freeze=False))
    assert re.search(f"^1 of .*'bad'.*{UNFIT[how]}", message)
    assert {key.split(".")[0] for key in glora.state_dict(model)} == {"good"}


def test_a_warning_counts_all_unfit_layers_and_names_the_first_few() -> None:
    model = nn.Sequential(nn.Linear(4, 4), *(nn.LazyLinear(4) for _ in range(8)))
    (message,) = warned(lambda: glora.apply(model))
    assert re.search(r"^8 of .*'1': .*; and 3 more", message)
    assert len(glora.plan(model, name="second").skipped) == 8


def test_a_lazy_layer_that_is_left_out_is_frozen_with_the_rest_and_given_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    glora.apply(model, ["0"])
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    glora.remove(model)
    assert all(parameter.requires_grad for parameter in model[1].parameters())


def test_no_bias_is_created_in_place_of_a_pruned_one() -> None:
    model = Pair()
    pruned_bias(model)
    refused(model, "'bad' is not: .*prun", ["bad"], GLoRAConfig(create_bias=True))


def test_only_unfit_layers_leave_nothing_to_train() -> None:
    refused(nn.Sequential(nn.LazyLinear(4)), "something to train.*'0'.*lazy")


# Layers without a bias.


def without_bias() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))


def test_without_a_bias_its_paths_are_left_out_with_one_warning() -> None:
    model = without_bias()
    planned = glora.plan(model)
    assert {layer.path: layer.paths for layer in planned.layers} == {
        "0": ("A", "B"),
        "1": ("A", "B", "C", "D", "E"),
        "2": ("A", "B"),
    }
    assert planned.without_bias == ("0", "2")
    (message,) = warned(lambda: glora.apply(model))
    assert re.search(r"^2 layers have no bias.*C, D and E.*\(0, 2\).*create_bias=True", message)
    attached = {key.rpartition(".")[0] for key in glora.state_dict(model)}
    assert attached == {"0.A", "0.B", "1.A", "1.B", "1.C", "1.D", "1.E", "2.A", "2.B"}
    assert model[0].bias is None
    assert not parametrize.is_parametrized(model[0], "bias")


def test_a_layer_whose_paths_all_need_a_bias_is_left_out_and_named() -> None:
    model = without_bias()
    planned = glora.plan(model, config=GLoRAConfig.bitfit())
    assert [layer.path for layer in planned.layers] == ["1"]
    assert [skipped.path for skipped in planned.skipped] == ["0", "2"]
    (message,) = warned(lambda: glora.apply(model, config=GLoRAConfig.bitfit()))
    assert re.search(r"^2 layers have no bias.*\(0, 2\)", message)
    assert type(model[0]) is nn.Linear


def test_paths_that_need_no_bias_need_no_warning() -> None:
    assert warned(lambda: glora.apply(without_bias(), config=GLoRAConfig(C="none", D="none", E="none"))) == []


@pytest.mark.parametrize("config", [GLoRAConfig.bitfit(), GLoRAConfig.prompt(), GLoRAConfig(A="none", B="none")])
def test_nothing_left_to_train_in_the_whole_call_is_refused(config: GLoRAConfig) -> None:
    refused(nn.Linear(4, 4, bias=False), "something to train.*bias.*create_bias=True", "all-linear", config)
    refused(without_bias(), "something to train.*create_bias=True", ["0", "2"], config)


def test_no_path_at_all_is_refused() -> None:
    nothing = GLoRAConfig(A="none", B="none", C="none", D="none", E="none")
    refused(Net(), "something to train.*every path is none", "all-linear", nothing)
    # Also where there is a bias to create: D alone would have nothing to scale.
    scale = GLoRAConfig(A="none", B="none", C="none", D="vector", E="none", create_bias=True)
    refused(nn.Linear(4, 4, bias=False), "something to train", "all-linear", scale)


# create_bias=True.

CREATE = GLoRAConfig(rank=1, init="random", create_bias=True)


def test_a_created_bias_is_frozen_zeros_without_a_warning() -> None:
    model = without_bias()
    assert warned(lambda: glora.apply(model, config=CREATE)) == []
    original = model[0].parametrizations.bias.original
    assert torch.equal(original, torch.zeros(4))
    assert not original.requires_grad
    assert not any(parameter is original for parameter in glora.parameters(model))


def test_a_created_bias_omits_D_and_a_bias_of_the_layers_own_does_not() -> None:
    model = without_bias()
    glora.apply(model, config=CREATE)
    paths = {key.rpartition(".")[0] for key in glora.state_dict(model)}
    assert {path for path in paths if path.startswith("0.")} == {"0.A", "0.B", "0.C", "0.E"}
    assert {path for path in paths if path.startswith("1.")} == {"1.A", "1.B", "1.C", "1.D", "1.E"}


def test_no_bias_is_created_where_no_path_asks_for_one() -> None:
    for config in (GLoRAConfig.lora(create_bias=True), GLoRAConfig.ia3(create_bias=True)):
        layer = glora.apply(nn.Linear(4, 4, bias=False), config=config)
        assert layer.bias is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_created_bias_has_the_weights_dtype(dtype: torch.dtype) -> None:
    layer = glora.apply(nn.Linear(4, 4, bias=False, dtype=dtype), config=CREATE)
    assert layer.bias.dtype == dtype
    assert layer(torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_a_created_bias_is_not_in_the_base_state_dict() -> None:
    model = without_bias()
    keys = list(model.state_dict())
    glora.apply(model, config=CREATE)
    assert sorted(glora.base_state_dict(model)) == sorted(keys)
    with glora.merged(model):
        assert sorted(glora.base_state_dict(model)) == sorted(keys)
    with glora.disabled(model):
        assert sorted(glora.base_state_dict(model)) == sorted(keys)


def test_a_created_bias_is_gone_after_remove() -> None:
    model = without_bias()
    before = snapshot(model)
    glora.remove(glora.apply(model, config=CREATE))
    assert model[0].bias is None
    assert snapshot(model) == before


def test_a_created_bias_is_kept_by_merge() -> None:
    model, x = without_bias(), torch.randn(3, 4)
    glora.apply(model, config=CREATE)
    W0 = model[0].parametrizations.weight.original.clone()
    own = glora.state_dict(model)
    bias = own["0.E.value"] + (W0 @ own["0.C.value"]).squeeze(1)
    y = model(x)
    glora.merge(model)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].bias, nn.Parameter)
    torch.testing.assert_close(model[0].bias.detach(), bias.clone())
    torch.testing.assert_close(model(x), y)


def test_a_created_bias_is_dropped_by_a_merge_of_the_base() -> None:
    model = without_bias()
    before = snapshot(model)
    glora.activate(glora.apply(model, config=CREATE), {})
    with pytest.warns(UserWarning, match="'default'"):
        glora.merge(model)
    assert snapshot(model) == before


def test_a_created_bias_is_not_demanded_by_a_strict_load_of_the_base() -> None:
    model = without_bias()
    base = {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}
    glora.apply(model, config=CREATE)
    before = {key: tensor.clone() for key, tensor in glora.state_dict(model).items()}
    assert model.load_state_dict(base, strict=True) == ([], [])
    assert all(torch.equal(tensor, base[key]) for key, tensor in glora.base_state_dict(model).items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in glora.state_dict(model).items())


def test_two_adapters_share_a_created_bias() -> None:
    model = without_bias()
    before = snapshot(model)
    glora.apply(model, config=CREATE, name="first")
    glora.apply(model, config=CREATE, name="second")
    glora.activate(model, {"first": 1.0, "second": 1.0})
    bias = sum(
        glora.state_dict(model, name)["0.E.value"]
        + (model[0].parametrizations.weight.original @ glora.state_dict(model, name)["0.C.value"]).squeeze(1)
        for name in ("first", "second")
    )
    torch.testing.assert_close(model[0].bias.detach(), bias)
    glora.remove(model)
    assert snapshot(model) == before


def test_a_second_adapter_that_creates_no_bias_gets_no_paths_on_a_created_one() -> None:
    model = without_bias()
    glora.apply(model, config=CREATE, name="first")
    (message,) = warned(lambda: glora.apply(model, config=GLoRAConfig(), name="second"))
    assert message.startswith("2 layers have no bias")
    assert {key for key in glora.state_dict(model, "second") if key[:3] in ("0.C", "0.D", "0.E")} == set()


# Wrappers.

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": AveragedModel,
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "compile of AveragedModel": lambda model: torch.compile(AveragedModel(model)),
    "AveragedModel of compile": lambda model: AveragedModel(torch.compile(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_paths_and_keys_drop_the_prefixes_of_wrappers(wrap: Callable[[nn.Module], Any]) -> None:
    plain = Net()
    base = plain.state_dict()
    model = wrap(plain)
    assert chosen(model, r"layers\.0\.q_proj") == ["layers.0.q_proj"]
    assert chosen(model) == ALL_OF_NET
    glora.apply(model, trainable=["embed"])
    expected = glora.apply(Net(), trainable=["embed"])
    assert list(glora.state_dict(model)) == list(glora.state_dict(expected))
    assert [key for key, _ in glora.named_parameters(model)] == [key for key, _ in glora.named_parameters(expected)]
    assert glora.base_state_dict(model).keys() == base.keys()
    assert [row.path for row in glora.summary(model).rows] == [row.path for row in glora.summary(expected).rows]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_root_layers_key_is_the_bare_path(wrap: Callable[[nn.Module], Any]) -> None:
    assert list(glora.state_dict(glora.apply(wrap(nn.Linear(4, 4)), config=LORA))) == ["B.left", "B.right"]


def test_a_models_own_attribute_named_like_a_wrappers_stays_in_the_path() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

    model = glora.apply(Holder(), ["module"], LORA)
    assert list(glora.state_dict(model)) == ["module.B.left", "module.B.right"]
    assert set(glora.base_state_dict(model)) == {"module.weight", "module.bias"}


# plan is what apply does.

CONFIGS = st.builds(
    GLoRAConfig,
    A=st.sampled_from(["lora", "vector", "constant", "none"]),
    B=st.sampled_from(["lora", "vector", "constant", "none"]),
    C=st.sampled_from(["lora", "vector", "none"]),
    D=st.sampled_from(["vector", "constant", "none"]),
    E=st.sampled_from(["vector", "constant", "none"]),
    rank=st.integers(1, 3),
    product=st.sampled_from(["hadamard", "matmul"]),
    create_bias=st.booleans(),
)


def mixed() -> nn.Module:
    """Layers of several shapes: with a bias, without one, lazy, reached twice, and a norm with buffers."""
    model = nn.Module()
    model.up, model.down = nn.Linear(3, 5), nn.Linear(5, 2, bias=False)
    model.late, model.again, model.norm = nn.LazyLinear(4), model.up, nn.BatchNorm1d(2)
    model.head = nn.Linear(2, 7)
    return model


@given(
    config=CONFIGS,
    exclude=st.sampled_from([(), ["head"], ["down"], "down|head"]),
    trainable=st.sampled_from([(), ["norm"], ["head", "norm"], ["down"]]),
)
def test_plan_is_what_apply_then_does_and_changes_nothing(config: GLoRAConfig, exclude: Any, trainable: Any) -> None:
    assume(any(form != "none" for form in config.forms.values()))
    model = mixed()
    before, generator = snapshot(model), torch.get_rng_state()
    planned = glora.plan(model, "all-linear", config, exclude=exclude, trainable=trainable)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)

    messages = warned(lambda: glora.apply(model, "all-linear", config, exclude=exclude, trainable=trainable))
    assert len(messages) == any(skipped.unfit for skipped in planned.skipped) + bool(planned.without_bias)
    attached = glora.state_dict(model)
    assert planned.parameters == sum(parameter.numel() for parameter in glora.parameters(model))
    assert planned.parameters == sum(row.parameters for row in (*planned.layers, *planned.heads))
    for layer in planned.layers:
        own = {key.removeprefix(f"{layer.path}.") for key in attached if key.startswith(f"{layer.path}.")}
        assert {key.split(".")[0] for key in own} == set(layer.paths)
        assert layer.forms == " ".join(f"{path}={config.forms[path]}" for path in layer.paths)
        assert layer.rank == (config.rank if any(key.endswith("left") for key in own) else None)
        assert layer.parameters == sum(attached[f"{layer.path}.{key}"].numel() for key in own)
        assert model.get_submodule(layer.path) is layer.module
    reached = [layer.path for layer in planned.layers] + [skipped.path for skipped in planned.skipped]
    assert sorted(reached) == ["down", "head", "late", "up"]
    touched = {key.split(".")[0] for key in attached}
    assert touched == {row.path for row in (*planned.layers, *planned.heads)}
    assert not touched & ({skipped.path for skipped in planned.skipped} - {head.path for head in planned.heads})

    again = snapshot(model)
    second = glora.plan(model, "all-linear", config, exclude=exclude, trainable=trainable, name="second")
    assert snapshot(model) == again
    assert second.parameters == planned.parameters


def test_a_plan_prints_every_layer_head_and_skipped_layer() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    planned = glora.plan(model, config=GLoRAConfig(rank=2), exclude=["1.k_proj"], trainable=["0.norm"])
    lines = str(planned).splitlines()
    assert re.search(r"'default'.* 3 layers, ", lines[0])
    cells = {line.split()[0]: line for line in lines[2:]}
    assert set(cells) == {*ALL_OF_NET, "layers.0.norm"}
    assert re.search(r"A=lora B=lora C=vector D=vector E=vector +2 +\d+$", cells["layers.0.q_proj"])
    assert "skipped: excluded" in cells["layers.1.k_proj"]
    assert "tied" in cells["head"]
    assert re.search(r"trainable +- +8$", cells["layers.0.norm"])


def test_plan_refuses_what_is_no_module() -> None:
    nothing: Any = {"head": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"nn\.Module; found a dict"):
        glora.plan(nothing)


def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was() -> None:
    model = without_bias()
    with unchanged(model), pytest.raises(UserWarning, match="create_bias=True"):
        glora.apply(model)
    model = Pair()
    lazy(model)
    with unchanged(model), pytest.raises(UserWarning, match="lazy"):
        glora.apply(model)
