"""What is written for PEFT computes in PEFT what it computes here: every kind of layer, exactly or nearly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import glora
from glora import GLoRAConfig, interop
from glora.__main__ import main
from tests.helpers.calls import FORMS, quiet
from tests.helpers.marks import examples
from tests.helpers.peers import IDS, assert_same, every

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NONE: dict[str, Any] = dict.fromkeys("ABCDE", "none")
PLACES = ["emb", "q", "k", "c", "conv1", "conv2", "experts.gate_up_proj", "experts.down_proj"]


def adapted(configs: dict[str, GLoRAConfig], seed: int = 0, transposed: bool = False) -> nn.Module:
    """`every`, with these layers adapted and random factors."""
    model = every(seed, transposed)
    with quiet():
        glora.apply(model, {path.replace(".", r"\."): config for path, config in configs.items()})
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_peft_computes(model: nn.Module, directory: Path, seed: int = 0, transposed: bool = False) -> Any:
    """Forward, and merged where PEFT can merge."""
    theirs = peft.PeftModel.from_pretrained(every(seed, transposed), str(directory)).eval()
    base = every(seed, transposed)(IDS)
    assert_same(model(IDS), theirs(IDS), base)
    config = theirs.peft_config["default"]
    if not getattr(config, "lora_bias", False):  # which PEFT merges into a bias that must be there
        assert_same(model(IDS), theirs.merge_and_unload()(IDS), base)
    return config


def exact(place: str) -> st.SearchStrategy[GLoRAConfig]:
    """Forms of this layer that are a LoRA."""
    no_bias = place == "emb" or place.startswith("experts")
    forms = {
        "A": st.sampled_from(["none", "none", "lora"]),
        "B": st.sampled_from(["lora", "lora", "vector", "constant"]),
        "C": st.just("none") if no_bias else st.sampled_from(FORMS["C"]),
        "D": st.just("none") if no_bias else st.sampled_from(FORMS["D"]),
        "E": st.just("none") if no_bias else st.sampled_from(FORMS["E"]),
    }
    return st.builds(
        GLoRAConfig,
        **forms,
        rank=st.integers(1, 3),
        alpha=st.sampled_from([None, 3, 0.7]),
        product=st.just("matmul"),
        init=st.just("random"),
    )


@st.composite
def loras(draw: st.DrawFn) -> dict[str, GLoRAConfig]:
    kinds = draw(st.sampled_from([PLACES, PLACES[1:6]]))
    places = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4, unique=True))
    if any(place.startswith("experts") for place in places):  # PEFT takes no Conv1D beside them
        places = [place for place in places if place != "c"]
    beside = [place for place in places if place == "emb" or place.startswith("experts")]
    configs = {place: draw(exact(place)) for place in places}
    if beside:  # PEFT has no lora_bias in a model with any of these
        configs = {
            path: GLoRAConfig.glora(**{**vars(config), "C": "none", "D": "none", "E": "none"})
            for path, config in configs.items()
        }
    return configs


@examples(30)
@given(loras(), st.integers(0, 9), st.booleans())
def test_a_lora_by_its_forms_leaves_exactly(tmp_path_factory: Any, configs: Any, seed: int, transposed: bool) -> None:
    directory = tmp_path_factory.mktemp("out")
    model = adapted(configs, seed, transposed)
    errors = interop.save_peft(model, directory, as_="lora")
    assert set(errors.values()) == {0.0}
    assert set(errors) == set(configs)
    assert assert_peft_computes(model, directory, seed, transposed).peft_type.value == "LORA"
    again = interop.load_peft(every(seed, transposed), directory)
    assert_same(again(IDS), model(IDS), every(seed, transposed)(IDS))


@examples(25)
@given(st.data(), st.integers(0, 9))
def test_what_auto_writes_is_exact_or_refused(tmp_path_factory: Any, data: st.DataObject, seed: int) -> None:
    """Any forms: where a method holds them PEFT computes the same; else nothing is written."""
    directory = tmp_path_factory.mktemp("auto") / "out"
    places = data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2, unique=True))
    forms = st.fixed_dictionaries({path: st.sampled_from(FORMS[path]) for path in "ABCDE"})
    config = data.draw(forms.filter(lambda drawn: drawn["A"] != "none" or drawn["B"] != "none"))
    rank, product = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["hadamard", "matmul"]))
    model = adapted(dict.fromkeys(places, GLoRAConfig.glora(**config, rank=rank, product=product, init="random")), seed)
    try:
        interop.save_peft(model, directory)
    except ValueError:
        assert not directory.exists()
    else:
        assert_peft_computes(model, directory, seed)
        assert_same(interop.load_peft(every(seed), directory)(IDS), model(IDS), every(seed)(IDS))


@pytest.mark.parametrize(
    ("places", "config", "method"),
    [
        ([place for place in PLACES if place != "c"], GLoRAConfig.lora(rank=2, init="random"), "LORA"),
        (PLACES[:6], GLoRAConfig.lora(rank=2, init="random"), "LORA"),
        (["emb", "q", "k", "c", "conv1", "conv2"], GLoRAConfig.hira(rank=2, alpha=3, init="random"), "HIRA"),
        (["k"], GLoRAConfig.ia3(init="random"), "IA3"),
        (["k", "c"], GLoRAConfig.glora(**{**NONE, "A": "vector"}, product="matmul", init="random"), "IA3"),
        (["q", "k"], GLoRAConfig.glora(rank=2, init="random"), "GLORA"),
        (["q", "c", "conv1"], GLoRAConfig.glora(A="vector", B="lora", rank=2, init="random"), "LORA"),
        (["q", "c", "conv1"], GLoRAConfig.ssf(init="random"), "LORA"),
        (["q", "conv1"], GLoRAConfig.bitfit(init="random"), "LORA"),
        (["emb"], GLoRAConfig.glora(**{**NONE, "A": "vector", "B": "lora"}, product="matmul", init="random"), "LORA"),
    ],
)
def test_each_method_by_its_forms(places: list[str], config: GLoRAConfig, method: str, tmp_path: Path) -> None:
    model = adapted(dict.fromkeys(places, config))
    interop.save_peft(model, tmp_path)
    assert assert_peft_computes(model, tmp_path).peft_type.value == method
    assert_same(interop.load_peft(every(), tmp_path)(IDS), model(IDS), every()(IDS))


def test_ia3_of_outputs_with_a_bias_is_ia3(tmp_path: Path) -> None:
    model = adapted(dict.fromkeys(["q", "c", "k"], GLoRAConfig.ia3(init="random")))
    tensors = glora.state_dict(model)
    glora.load_state_dict(model, {f"{p}.D.value": tensors[f"{p}.A.value"][:, 0] for p in "qc"}, strict=False)
    interop.save_peft(model, tmp_path)
    assert assert_peft_computes(model, tmp_path).peft_type.value == "IA3"


@examples(25)
@given(st.data(), st.integers(0, 9))
def test_a_lora_of_pefts_goes_back_to_the_bit(tmp_path_factory: Any, data: st.DataObject, seed: int) -> None:
    directory = tmp_path_factory.mktemp("back")
    config = peft.LoraConfig(
        r=data.draw(st.integers(1, 3)),
        lora_alpha=data.draw(st.sampled_from([1, 5, 8])),
        use_rslora=data.draw(st.booleans()),
        rank_pattern=data.draw(st.sampled_from([{}, {"q": 4}])),
        alpha_pattern=data.draw(st.sampled_from([{}, {"k": 7, "conv1": 3}])),
        target_modules=data.draw(st.lists(st.sampled_from(PLACES[:6]), min_size=1, unique=True)),
        modules_to_save=data.draw(st.sampled_from([None, ["head"]])),
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(every(seed), config).eval()
    theirs.save_pretrained(directory / "theirs")
    interop.save_peft(interop.load_peft(every(seed), directory / "theirs"), directory / "ours")
    before, after = (load_file(directory / name / TENSORS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = peft.PeftModel.from_pretrained(every(seed), str(directory / "ours")).eval()
    assert_same(again(IDS), theirs(IDS), every(seed)(IDS))


def weight_of(model: nn.Module, place: str) -> Tensor:
    module, _, name = place.partition(".")
    return getattr(model.get_submodule(module), name or "weight")


@examples(25)
@given(st.sampled_from(PLACES), st.integers(1, 6), st.integers(0, 9), st.data())
def test_the_nearest_lora_has_the_error_that_it_says(
    tmp_path_factory: Any, place: str, rank: int, seed: int, data: st.DataObject
) -> None:
    """By the singular values of the update; and never more than at a smaller rank."""
    directory = tmp_path_factory.mktemp("near")
    A, B = data.draw(st.sampled_from(["lora", "vector", "constant"])), data.draw(st.sampled_from(FORMS["B"]))
    config = GLoRAConfig.glora(**{**NONE, "A": A, "B": B}, rank=2, init="random")
    model = adapted({place: config}, seed)
    errors = interop.save_peft(model, directory, as_="lora", rank=rank)
    loaded = interop.load_peft(every(seed), directory)
    W0, W, L = (weight_of(m, place).detach() for m in (every(seed), model, loaded))
    update, rest = (W - W0).double(), (W - L).double()
    assert abs(float(rest.norm() / update.norm()) - errors[place]) < 1e-4
    matrices = update.flatten(1) if update.ndim != 3 or not place.startswith("experts") else update
    S = torch.linalg.svdvals(matrices)
    assert abs(float(S[..., rank:].square().sum().sqrt() / S.square().sum().sqrt()) - errors[place]) < 1e-4
    theirs = peft.PeftModel.from_pretrained(every(seed), str(directory)).eval()
    assert_same(loaded(IDS), theirs(IDS), every(seed)(IDS))


def test_the_error_is_printed_and_refused_above_the_tolerance(tmp_path: Path, capsys: Any) -> None:
    model = adapted({"q": GLoRAConfig.hira(rank=2, init="random"), "k": GLoRAConfig.lora(rank=1, init="random")})
    with pytest.raises(ValueError, match=r"tolerance=0\.001; 'q' has .*, and nothing was written"):
        interop.save_peft(model, tmp_path / "out", as_="lora", rank=2, tolerance=1e-3)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    errors = interop.save_peft(model, tmp_path / "out", as_="lora", rank=2, tolerance=1.0)
    assert errors["k"] == 0.0
    assert "1 of 2 layers are approximated" in capsys.readouterr().out
    full = interop.save_peft(model, tmp_path / "out", as_="lora", rank=6)
    assert max(full.values()) < 1e-6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "none does .* 'q' has A=lora .elementwise., an update of W0's own rank"),
        ({"as_": "lora"}, "as lora, 'q' has A=lora"),
        ({"as_": "oft"}, "as_ must be"),
        ({"rank": 4}, "rank= is the most"),
        ({"as_": "lora", "rank": 0}, "rank= is the most"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = adapted({"q": GLoRAConfig.glora(A="lora", B="none", init="random")})
    with pytest.raises(ValueError, match=named):
        interop.save_peft(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_conv1d_beside_parameters_is_refused(tmp_path: Path) -> None:
    model = adapted(dict.fromkeys(["c", "experts.down_proj"], GLoRAConfig.lora(rank=2, init="random")))
    with pytest.raises(ValueError, match="Conv1D layers beside parameters"):
        interop.save_peft(model, tmp_path / "out")


def test_servers_and_converters_read_the_keys(tmp_path: Path) -> None:
    """llama.cpp's convert_lora_to_gguf wants base_model.model.<path>.lora_A.weight and lora_B.weight, `r` and
    `lora_alpha` of numbers; vLLM and SGLang want `target_modules` as last components."""
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
    glora.apply(model, ["q_proj", "v_proj"], GLoRAConfig.lora(rank=4, alpha=8))
    interop.save_peft(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert {key: config[key] for key in ("peft_type", "r", "lora_alpha", "bias", "use_dora", "use_rslora")} == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["lora_bias"]
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / TENSORS).items()}
    at = "base_model.model.model.layers"
    assert shapes == {
        f"{at}.{i}.self_attn.{name}.lora_{factor}.weight": (4, 16) if factor == "A" else (16, 4)
        for i in (0, 1)
        for name in ("q_proj", "v_proj")
        for factor in "AB"
    }


def test_servers_read_what_is_converted_without_the_model(tmp_path: Path) -> None:
    """A list, not a regex; where a path ends another one, PEFT's own start there does nothing."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))

    model = glora.apply(build(), {"0": (config := GLoRAConfig.lora(rank=4, init="random")), r"1\.1": config})
    glora.save(model, tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "peft-lora"]) == 0
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    fields = ("target_modules", "r", "lora_alpha", "bias", "modules_to_save", "use_dora", "rank_pattern")
    wanted = [["0", "1.1"], 4, 4, "none", None, False, {}]
    assert [config[field] for field in fields] == wanted
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "out")).eval()
    x = torch.randn(3, 2)
    assert_same(model(x), theirs(x), build()(x))


@pytest.mark.parametrize("targets", [["0"], ["block.0"], ["block.0", "other.0"], ["block.0", "0"]])
def test_no_other_module_is_targeted(targets: list[str], tmp_path: Path) -> None:
    """Lists of suffixes reach more than they name; the files then have whole paths, or a regex."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"block": nn.ModuleList([nn.Linear(2, 2)]), "other": nn.ModuleList([nn.Linear(2, 2)])})

    model = nn.Sequential(nn.Linear(2, 2), build())
    chosen = [f"1.{t}" if "." in t else t for t in targets]
    glora.apply(model, "|".join(t.replace(".", r"\.") for t in chosen), GLoRAConfig.lora(rank=1, init="random"))
    interop.save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2), build()), str(tmp_path))
    reached = {name.partition("base_model.model.")[2] for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert reached == set(chosen)


def test_running_statistics_that_training_changed_go_to_peft_with_their_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 2))
    x = torch.randn(6, 3, 5)
    model = glora.apply(copy.deepcopy(base), ["3"], glora.GLoRAConfig.lora(rank=2))
    glora.interop.save_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None
    model.train()(x)
    glora.interop.save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model.eval()(x))
    torch.testing.assert_close(glora.interop.load_peft(copy.deepcopy(base), tmp_path).eval()(x), model(x))
