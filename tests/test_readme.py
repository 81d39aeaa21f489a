"""The README: short, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import glora

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(glora.__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the installed package has no README beside it")
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if README.exists() else []


def small(*_: object) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    return transformers.LlamaForCausalLM(config)


def test_it_has_900_words_at_most() -> None:
    assert len(README.read_text().split()) <= 900


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_lines_and_the_everyday_calls_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", small)
    held: dict[str, Any] = {}
    exec(BLOCKS[0], held)
    assert glora.adapters(held["model"]) == {}
    assert not any("parametrizations" in key for key in held["model"].state_dict())

    forms: dict[Any, Any] = {r".*q_proj": glora.GLoRAConfig(A="vector"), r".*mlp.*": glora.GLoRAConfig.hira()}
    glora.save(glora.apply(small(), forms), "adapters/new")
    tuned = small()
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(1.0)
    safetensors.save_file(tuned.state_dict(), "tuned.safetensors")
    base = {key: value.clone() for key, value in held["model"].state_dict().items()}
    held |= {"x": torch.randint(100, (2, 5)), "model": held["model"]}
    exec(BLOCKS[2], held)
    assert glora.adapters(held["model"]) == {}
    for key, value in held["model"].state_dict().items():
        assert torch.equal(value, base[key])
    assert Path("out/adapter_config.json").exists()
