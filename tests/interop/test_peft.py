"""PEFT's files: what they compute, to 1e-5, against PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from glora import interop
from tests.helpers.peers import X, adapted, net

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own


FORMS = [
    {"config_A_B": ab, "config_C": c, "config_D_E": de}
    for ab, c, de in (
        ("lora", "lora", "constant"),
        ("lora", "vector", "vector"),
        ("vector", "none", "none"),
        ("constant", "none", "vector"),
        ("none", "lora", "vector"),
    )
]


CONFIGS: list[Any] = [
    *[peft.GloraConfig(r=3, target_modules=["q", "k"], **forms) for forms in FORMS],
    peft.GloraConfig(r=3, target_modules=["q"], modules_to_save=["head", "norm"]),
    peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q", "k"]),
    peft.LoraConfig(r=2, target_modules=["q", "k"], rank_pattern={"k": 3}, alpha_pattern={"block.q": 7}),
    peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q", "k"], use_rslora=True, modules_to_save=["head"]),
    peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q", "k"], lora_bias=True),
    # The scale is of the layer's own rank; patterns are regexes, behind a dot or at the start.
    peft.LoraConfig(r=2, target_modules=["q", "k"], rank_pattern={"k": 3}, use_rslora=True),
    peft.LoraConfig(r=2, target_modules=["q", "k"], alpha_pattern={r"bl.*\.q": 7, "lock.k": 50}),
    peft.HiraConfig(r=2, target_modules=["q", "k"], rank_pattern={"k": 3}),
    peft.IA3Config(target_modules=["q", "k"], feedforward_modules=["k"]),
    peft.IA3Config(target_modules=["q", "k"], feedforward_modules=[]),
]


def trained(config: Any) -> nn.Module:
    model = peft.get_peft_model(net(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type.value)
def test_what_peft_saved_computes_what_peft_computes(config: Any, tmp_path: Path) -> None:
    model = trained(config)
    model.save_pretrained(tmp_path)
    ours = interop.load_peft(net(), tmp_path).eval()
    torch.testing.assert_close(ours(X), model(X), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(X), net()(X), atol=1e-3)
    merged = glora.merge(ours)
    torch.testing.assert_close(merged(X), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"A": "lora", "B": "lora", "C": "lora", "D": "vector", "E": "vector", "alpha": 5.0},
        {"A": "vector", "B": "vector", "C": "vector", "D": "constant", "E": "constant"},
        {"A": "constant", "B": "constant", "C": "none", "D": "none", "E": "none", "trainable": ["head"]},
        {"A": "none", "B": "none", "C": "vector", "D": "vector", "E": "vector", "targets": ["q"]},
    ],
)
def test_peft_computes_what_was_saved_for_it(options: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(**options)
    interop.save_peft(ours, tmp_path)
    model = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(model(X), ours(X), atol=1e-5, rtol=1e-5)
    again = interop.load_peft(net(), tmp_path).eval()
    torch.testing.assert_close(again(X), ours(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"A": "vector"}, "A=vector and B=lora"),
        ({"D": "none"}, "D=none and E=vector"),
        ({"product": "matmul"}, "product='matmul'"),
        ({"create_bias": True}, "bias that was created"),
    ],
)
def test_what_pefts_glora_cannot_say_is_refused_by_name(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        interop.save_peft(adapted(**options), tmp_path / "out", as_="glora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa"), "pissa"),
        (peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="olora"), "olora"),
        (
            peft.OFTConfig(oft_block_size=2, target_modules=["q"]),
            "'OFT', and the formula has no place for a rotation of W0",
        ),
        (peft.BOFTConfig(boft_block_size=2, target_modules=["q"]), "'BOFT', and .* a rotation of W0"),
        (peft.RoadConfig(group_size=2, target_modules=["q"]), "'ROAD', and .* a rotation of W0"),
        (peft.FourierFTConfig(n_frequency=2, target_modules=["q"]), "'FOURIERFT', and .* neither of a low rank"),
    ],
)
def test_what_glora_does_not_do_is_refused_by_name(config: Any, named: str, tmp_path: Path) -> None:
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    model = net()
    with pytest.raises(glora.AdapterFileError, match=named):
        interop.load_peft(model, tmp_path)
    assert not glora.adapters(model)


def another_net() -> nn.Module:
    model = net()
    with torch.no_grad():
        model.block["q"].weight.neg_()
    return model


def test_a_file_for_peft_knows_its_base_and_peft_reads_it(tmp_path: Path) -> None:
    interop.save_peft(adapted(targets=["q"]), tmp_path)
    model = interop.load_peft(net(), tmp_path, strict=True)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(X), model(X), atol=1e-5, rtol=1e-5)
    with pytest.raises(glora.AdapterFileError, match=r"in block\.q\.weight\. "):
        interop.load_peft(another_net(), tmp_path, strict=True)
    with pytest.warns(UserWarning, match=r"in block\.q\.weight\. "):
        interop.load_peft(another_net(), tmp_path)


def test_a_file_of_pefts_own_knows_no_base(tmp_path: Path) -> None:
    trained(CONFIGS[0]).save_pretrained(tmp_path)
    interop.load_peft(another_net(), tmp_path, strict=True)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    model = net()
    model.head = nn.Linear(8, 8)
    model.head.weight = model.block["k"].weight
    glora.apply(model, ["q"], glora.GLoRAConfig.lora(), trainable=["head"])
    with pytest.raises(ValueError, match=r"'block\.k\.weight' is tied to 'head\.weight'"):
        interop.save_peft(model, tmp_path)
