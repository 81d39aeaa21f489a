"""`glora convert` beside a checkpoint or a model's folder: what the model at hand would write and read."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora import interop
from glora.__main__ import main
from tests.helpers.calls import only
from tests.helpers.marks import examples

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

TENSORS = "adapter_model.safetensors"
QK: dict[str, Any] = {"target_modules": ["q", "k"]}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(emb=nn.Embedding(9, 6), q=nn.Linear(6, 6), k=nn.Linear(6, 4, bias=False)))


def converted(folder: Path, adapter: Path, to: str, *options: str) -> Path:
    out = folder / ("out.safetensors" if to in ("kohya", "lycoris") else f"out-{to}")
    save_file(build().state_dict(), folder / "base.safetensors")
    base = ["--base", str(folder / "base.safetensors")]
    assert main(["convert", str(adapter), str(out), "--to", to, *base, *options]) == 0
    return out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == 1
    return capsys.readouterr().err


@st.composite
def configs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> glora.GLoRAConfig:
    forms: dict[str, Any] = {name: draw(st.sampled_from(["none", "vector", "constant", "lora"])) for name in "AB"}
    forms |= {name: draw(st.sampled_from(["none", "vector"])) for name in "CDE"}
    forms["B"] = "lora" if forms["A"] == "none" else forms["B"]
    return glora.GLoRAConfig.glora(**forms, product=draw(st.sampled_from(["hadamard", "matmul"])), rank=2, alpha=3)


@examples(25)
@given(config=configs(), rank=st.integers(1, 6))
def test_peft_lora_is_what_save_peft_writes_of_the_model(
    tmp_path_factory: Any, config: glora.GLoRAConfig, rank: int
) -> None:
    folder = tmp_path_factory.mktemp("lora")
    model = glora.apply(build(), ["q", "k"], config)
    for parameter in glora.parameters(model):
        nn.init.normal_(parameter)
    glora.save(model, folder / "a")
    interop.save_peft(model, folder / "wanted", as_="lora", rank=rank)
    found = load_file(converted(folder, folder / "a", "peft-lora", "--rank", str(rank)) / TENSORS)
    wanted = load_file(folder / "wanted" / TENSORS)
    assert found.keys() == wanted.keys()
    for key in found:
        torch.testing.assert_close(found[key], wanted[key])


def test_the_errors_are_printed_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glora.save(glora.apply(build(), ["q"], only(A="lora", rank=2, init="random")), tmp_path / "a")
    converted(tmp_path, tmp_path / "a", "peft-lora", "--rank", "1")
    assert "1 of 1 layers are approximated" in capsys.readouterr().out
    arguments = tmp_path / "a", tmp_path / "b", "--to", "peft-lora", "--base", tmp_path / "base.safetensors"
    assert "tolerance=0.001" in refusal(capsys, *arguments, "--rank", "1", "--tolerance", "0.001")
    assert "as_='lora' with a rank=" in refusal(capsys, *arguments)  # it is none exactly
    assert not (tmp_path / "b").exists()


CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=2, bias="all", init_lora_weights=False, target_modules=["emb", "q"]),
    "DoRA": peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **QK),
    "DoRA of an embedding": peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["emb"]),
    "LoHa": peft.LoHaConfig(r=1, init_weights=False, **QK),
    "LoKr": peft.LoKrConfig(r=1, init_weights=False, **QK),
    "VeRA": peft.VeraConfig(r=2, init_weights=False, **QK),
    "RandLoRA": peft.RandLoraConfig(r=2, init_weights=False, **QK),
    "MiSS": peft.MissConfig(r=2, init_weights=False, **QK),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_computed_beside_the_base_is_read_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(), CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    ids = torch.arange(9)
    ours = glora.load(build(), converted(tmp_path, tmp_path / "a", "glora"))
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-5, atol=1e-5)
    back = converted(tmp_path, tmp_path / "a", "peft")
    again = peft.PeftModel.from_pretrained(build(), str(back)).eval()
    torch.testing.assert_close(again(ids), theirs(ids), rtol=1e-5, atol=1e-5)


def test_kohya_has_its_prefix_and_lora_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glora.save(glora.apply(build(), ["q", "k"], glora.GLoRAConfig.lora(rank=2, init="random")), tmp_path / "a")
    found = load_file(converted(tmp_path, tmp_path / "a", "kohya"))
    names = {f"lora_unet_{name}.{part}" for name in "qk" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert found.keys() == names
    found = load_file(converted(tmp_path, tmp_path / "a", "kohya", "--prefix", "lora_te"))
    assert {key.partition(".")[0] for key in found} == {"lora_te_q", "lora_te_k"}
    again = converted(tmp_path, tmp_path / "out.safetensors", "glora")
    ours, ids = glora.load(build(), again), torch.arange(9)
    torch.testing.assert_close(ours(ids), glora.load(build(), tmp_path / "a")(ids))
    glora.save(glora.apply(build(), ["q"], only(A="lora", B="lora", rank=2, product="matmul")), tmp_path / "g")
    said = refusal(capsys, tmp_path / "g", tmp_path / "g.safetensors", "--to", "kohya")
    assert "'q' (A=lora B=lora)" in said
    assert not (tmp_path / "g.safetensors").exists()


@pytest.mark.parametrize(
    ("to", "option"), [("peft", "--rank=2"), ("glora", "--tolerance=0.1"), ("peft-lora", "--prefix=lora_te")]
)
def test_an_option_of_another_format_is_named(
    to: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    glora.save(glora.apply(build(), ["q"], config=glora.GLoRAConfig.glora()), tmp_path / "a")
    said = refusal(capsys, tmp_path / "a", tmp_path / "b", "--to", to, option)
    assert f"{option.partition('=')[0]} goes with --to" in said
    assert not (tmp_path / "b").exists()


def test_a_base_of_other_layers_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glora.save(glora.apply(build(), ["q", "k"], only(A="lora", rank=2)), tmp_path / "a")
    save_file({"q.weight": torch.ones(6, 5)}, tmp_path / "base.safetensors")
    said = refusal(capsys, tmp_path / "a", tmp_path / "b", "--to", "peft", "--base", tmp_path / "base.safetensors")
    assert "'q' of (6, 5) where (6, 6) is adapted" in said
    assert "no 'k'" in said


def test_another_base_is_warned_of(tmp_path: Path) -> None:
    glora.save(glora.apply(build(), ["q"], only(A="lora", rank=2)), tmp_path / "a")
    save_file({key: tensor + 1 for key, tensor in build().state_dict().items()}, tmp_path / "base.safetensors")
    options = ["--to", "peft-lora", "--rank", "2", "--base", str(tmp_path / "base.safetensors")]
    with pytest.warns(UserWarning, match=r"trained beside others than this base has in q\.bias, q\.weight"):
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *options]) == 0


# What a checkpoint's file does not tell, and the model's folder does.


def gpt2() -> Any:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).eval()


def mixtral() -> Any:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    few = {"num_key_value_heads": 2, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=20, **sizes, **few)).eval()


SQUARE = peft.LoraConfig(
    r=2, use_dora=True, init_lora_weights=False, fan_in_fan_out=True, target_modules=["c_proj", "c_attn"]
)
EXPERTS = peft.LoraConfig(
    r=2,
    init_lora_weights=False,
    target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)


@pytest.mark.parametrize(
    ("model", "config", "said"), [(gpt2, SQUARE, "fan_in_fan_out"), (mixtral, EXPERTS, "which parameters of")]
)
def test_a_models_folder_tells_what_a_file_does_not(
    model: Callable[[], Any], config: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, ids = model(), torch.arange(12).view(2, 6)
    base.save_pretrained(tmp_path / "model")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    arguments = tmp_path / "a", tmp_path / "out", "--to", "glora", "--base"
    assert said in refusal(capsys, *arguments, tmp_path / "model" / "model.safetensors")
    assert main(["convert", *map(str, arguments), str(tmp_path / "model")]) == 0
    ours: Any = glora.load(copy.deepcopy(base), tmp_path / "out")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    # And back, beside the folder.
    out = [str(tmp_path / "out"), str(tmp_path / "back"), "--to", "peft", "--base", str(tmp_path / "model")]
    assert main(["convert", *out]) == 0
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "back")).eval()
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_convolution_is_written_for_lycoris_from_a_file_and_for_peft_from_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3)})
    save_file(model.state_dict(), tmp_path / "conv.safetensors")
    glora.save(glora.apply(model, ["conv"], glora.GLoRAConfig.lora(rank=2, init="random")), tmp_path / "a")
    base = "--base", tmp_path / "conv.safetensors"
    interop.save_lycoris(model, tmp_path / "wanted.safetensors")
    assert main(["convert", *map(str, (tmp_path / "a", tmp_path / "l.safetensors", "--to", "lycoris", *base))]) == 0
    found: dict[str, Tensor] = load_file(tmp_path / "l.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in load_file(tmp_path / "wanted.safetensors").items())
    assert "give the model's folder" in refusal(capsys, tmp_path / "a", tmp_path / "p", "--to", "peft", *base)


def test_a_folder_of_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glora.save(glora.apply(build(), ["q"], config=glora.GLoRAConfig.glora()), tmp_path / "a")
    (tmp_path / "model").mkdir()
    options = tmp_path / "a", tmp_path / "b", "--to", "peft", "--base", tmp_path / "model"
    assert "A checkpoint's folder has one .safetensors file" in refusal(capsys, *options)
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Mine"]}')
    assert "has 'Mine'" in refusal(capsys, *options)
    for config in (
        '{"architectures": 5}',
        "[1]",
        '{"architectures": ["LlamaForCausalLM"], "model_type": "nothing"}',
        "{",
    ):
        (tmp_path / "model" / "config.json").write_text(config)
        assert str(tmp_path / "model") in refusal(capsys, *options)


def test_merge_computes_a_dora_beside_its_base_and_refuses_weights_that_may_lie_transposed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = peft.get_peft_model(build(), CONFIGS["DoRA"]).eval()
    theirs.save_pretrained(tmp_path / "a")
    save_file(build().state_dict(), tmp_path / "base.safetensors")
    out = str(tmp_path / "merged.safetensors")
    assert main(["merge", str(tmp_path / "base.safetensors"), str(tmp_path / "a"), out]) == 0
    merged, ids = build(), torch.arange(9)
    merged.load_state_dict(load_file(out))
    torch.testing.assert_close(merged(ids), theirs(ids))
    base = gpt2()
    base.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, fan_in_fan_out=True, target_modules=["attn.c_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "square")
    capsys.readouterr()
    arguments = tmp_path / "model" / "model.safetensors", tmp_path / "square", tmp_path / "out.safetensors"
    assert main(["merge", *map(str, arguments)]) == 1
    assert "fan_in_fan_out" in capsys.readouterr().err
