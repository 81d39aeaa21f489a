"""PEFT's files over many configs and shapes: what they compute against PEFT itself, and round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.calls import FORMS, quiet
from tests.helpers.marks import examples
from tests.helpers.peers import Layers, layers, net
from tests.helpers.state import snapshot

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANKS = st.integers(1, 3)
# Patterns that are more than the end of a path, each matching "block.0", "block.1", both or none.
PATTERNS = ["0", "1", "block.1", r"block\.[01]", "blo.*0", "lock.0", "block", "(0|1)", r"\d"]


def trained(model: nn.Module, config: Any) -> nn.Module:
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@st.composite
def glora_configs(draw: st.DrawFn) -> Any:
    forms = {
        "config_A_B": draw(st.sampled_from(FORMS["A"])),
        "config_C": draw(st.sampled_from(FORMS["C"])),
        "config_D_E": draw(st.sampled_from(FORMS["D"])),
    }
    assume(set(forms.values()) != {"none"})
    saved = draw(st.sampled_from([None, ["head"]]))
    return peft.GloraConfig(r=draw(RANKS), target_modules=r"block\.\d", modules_to_save=saved, **forms)


def patterns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A pattern of PEFT's, sorted as PEFT's file has it: of several keys that match, the first counts."""
    return st.dictionaries(st.sampled_from(PATTERNS), values, max_size=2).map(lambda found: dict(sorted(found.items())))


@st.composite
def other_configs(draw: st.DrawFn) -> Any:
    common = {"target_modules": r"block\.\d", "modules_to_save": draw(st.sampled_from([None, ["head"]]))}
    method = draw(st.sampled_from(["LORA", "LORA", "HIRA", "IA3"]))
    if method == "IA3":
        scales_inputs = draw(st.sampled_from([[], ["0"], ["block.1"], r"block\.\d"]))
        return peft.IA3Config(**common, feedforward_modules=scales_inputs)
    ranks = draw(patterns(RANKS))
    if method == "HIRA":
        return peft.HiraConfig(r=draw(RANKS), rank_pattern=ranks, **common)
    return peft.LoraConfig(
        r=draw(RANKS),
        lora_alpha=draw(st.sampled_from([1, 5, 0.5])),
        rank_pattern=ranks,
        alpha_pattern=draw(patterns(st.sampled_from([2, 3.5]))),
        use_rslora=draw(st.booleans()),
        lora_bias=draw(st.booleans()),
        **common,
    )


@examples(150)
@given(layers(), st.one_of(glora_configs(), other_configs()))
def test_peft_to_glora_computes_what_peft_computes(tmp_path_factory: Any, made: Layers, config: Any) -> None:
    directory = tmp_path_factory.mktemp("peft")
    if getattr(config, "lora_bias", False):  # PEFT adds it to a bias that must be there
        made = made.with_biases()
    theirs = trained(made.model(), config)
    theirs.save_pretrained(directory)
    try:
        ours = interop.load_peft(made.model(), directory).eval()
    except glora.AdapterFileError:  # PEFT writes zeros where nothing is adapted
        assert config.config_A_B == "none"
        assert not any(made.biases)
        return
    torch.testing.assert_close(ours(made.input()), theirs(made.input()), atol=1e-5, rtol=1e-4)


@given(layers(), glora_configs())
def test_peft_to_glora_to_peft_gives_the_same_files(tmp_path_factory: Any, made: Layers, config: Any) -> None:
    directory = tmp_path_factory.mktemp("peft")
    made = made if config.config_A_B != "none" else made.with_biases()
    trained(made.model(), config).save_pretrained(directory / "theirs")
    ours = interop.load_peft(made.model(), directory / "theirs")
    interop.save_peft(ours, directory / "ours")
    before, after = (load_file(directory / name / TENSORS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    said, says = (json.loads((directory / name / CONFIG).read_text()) for name in ("theirs", "ours"))
    # The rank means something where a path is low rank, and C, D and E where a layer has a bias.
    fields = ["peft_type", "config_A_B", "modules_to_save", "bias"]
    fields += ["r"] if any(key.endswith("Xd") for key in before) else []
    fields += ["config_C", "config_D_E"] if any(made.biases) else []
    assert {field: says[field] for field in fields} == {field: said[field] for field in fields}


@given(layers(), st.data())
def test_glora_to_peft_to_glora_is_the_same_function(tmp_path_factory: Any, made: Layers, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("peft")
    ab, c, de = (data.draw(st.sampled_from(FORMS[path])) for path in "ACD")
    made = made if ab != "none" else made.with_biases()
    assume({ab, c, de} != {"none"})
    config = glora.GLoRAConfig.glora(
        **dict(zip("ABCDE", (ab, ab, c, de, de), strict=True)),
        rank=data.draw(RANKS),
        alpha=data.draw(st.sampled_from([None, 1, 7.5])),
        init="random",
    )
    with quiet():
        ours = glora.apply(made.model(), r"block\.\d", config, trainable=data.draw(st.sampled_from([(), ["head"]])))
    interop.save_peft(ours, directory)
    again = interop.load_peft(made.model(), directory)
    for one, other in zip(ours.block, again.block, strict=True):
        torch.testing.assert_close(other.weight, one.weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other.bias, one.bias, atol=1e-6, rtol=1e-5)
    theirs = peft.PeftModel.from_pretrained(made.model(), directory).eval()
    torch.testing.assert_close(theirs(made.input()), ours(made.input()), atol=1e-5, rtol=1e-4)


FIELDS = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "peft_type", "bias"),
    *("feedforward_modules", "config_A_B", "config_C", "config_D_E", "init_lora_weights", "fan_in_fan_out"),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.sampled_from(["(", "*", "lora", "", "0"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["(", "0"]), inner))
SOME = {
    "LORA": {"lora_A.weight": (2, 4), "lora_B.weight": (3, 2)},
    "IA3": {"ia3_l": (3, 1)},
    "HIRA": {"hira_A": (2, 4), "hira_B": (3, 2)},
    "GLORA": {"glora_A.X": (3, 1), "glora_B.X": (3, 1), "glora_C.X": (4, 1), "glora_D.X": (3,), "glora_E.X": (3,)},
}


def of_method(directory: Path, method: str, **fields: Any) -> None:
    tensors: dict[str, Tensor] = {f"base_model.model.0.{key}": torch.ones(size) for key, size in SOME[method].items()}
    save_file(tensors, directory / TENSORS)
    forms = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"} if method == "GLORA" else {}
    config = {"peft_type": method, "r": 2, "lora_alpha": 2, **forms, **fields}
    (directory / CONFIG).write_text(json.dumps(config))


@examples(200)
@given(st.sampled_from(sorted(SOME)), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
def test_an_odd_config_is_an_adapter_file_error(tmp_path_factory: Any, method: str, fields: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("odd")
    model = nn.Sequential(nn.Linear(4, 3))
    of_method(directory, method)
    interop.load_peft(nn.Sequential(nn.Linear(4, 3)), directory)
    of_method(directory, method, **fields)
    before = snapshot(model)
    try:
        interop.load_peft(model, directory)
    except glora.AdapterFileError:
        assert snapshot(model) == before
    else:  # the fields that were drawn say nothing of this method, or what it takes
        assert list(glora.adapters(model)) == ["default"]


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"(": 2}},
        {"modules_to_save": 2},
        {"modules_to_save": [1]},
        {"modules_to_save": "head"},
        {"rank_pattern": ["0"]},
    ],
)
def test_a_config_that_peft_would_not_write_is_an_adapter_file_error(fields: dict[str, Any], tmp_path: Path) -> None:
    of_method(tmp_path, "LORA", **fields)
    with pytest.raises(glora.AdapterFileError, match="do not go together"):
        interop.load_peft(nn.Sequential(nn.Linear(4, 3)), tmp_path)


def test_peft_finds_no_adapter_of_its_own_in_a_folder_of_gloras(tmp_path: Path) -> None:
    of_method(tmp_path, "LORA")
    model = glora.apply(net(), ["q"], glora.GLoRAConfig.lora())
    glora.save(model, tmp_path)  # over PEFT's files: its config would describe our tensors
    with pytest.raises(ValueError, match=CONFIG):
        peft.PeftModel.from_pretrained(net(), tmp_path)
    with pytest.raises(FileNotFoundError, match="glora.load"):
        interop.load_peft(net(), tmp_path)
    interop.save_peft(glora.apply(net(), ["q"], config=glora.GLoRAConfig.glora()), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]
    with pytest.raises(glora.AdapterFileError, match="load_peft"):
        glora.load(net(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [None, 1, 5])
def test_factors_of_any_dtype_are_scaled_in_float32_at_least(
    dtype: torch.dtype, alpha: float | None, tmp_path: Path
) -> None:
    config = glora.GLoRAConfig.glora(rank=3, alpha=alpha)
    model = glora.apply(nn.Sequential(nn.Linear(8, 6)), config=config).to(dtype)
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.normal_()
    interop.save_peft(model, tmp_path)
    written, ours = load_file(tmp_path / TENSORS), glora.state_dict(model)
    for path in "AB":
        product = (
            written[f"base_model.model.0.glora_{path}.Xd"].double()
            @ written[f"base_model.model.0.glora_{path}.Xu"].double()
        )
        wanted = ours[f"0.{path}.left"].double() @ ours[f"0.{path}.right"].double() * config.scaling
        wanted = wanted * ours.get(f"0.{path}.balance", 1)
        torch.testing.assert_close(product, wanted, rtol=1e-5, atol=1e-5)
