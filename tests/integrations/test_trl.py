"""TRL: the base as the reference of DPO, KTO, GRPO and RLOO gives the numbers of a separately loaded base."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

import glora
from glora.integrations.trl import BaseReference, reference
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import Residual, block
from tests.helpers.strategies import Case, cases

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@given(cases())
def test_a_reference_is_the_base_and_shares_its_tensors(case: Case) -> None:
    layer, base, x = case.build(), case.plain(), case.input()
    flags = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    expected = layer(x)
    made = reference(layer)
    assert torch.equal(made(x), base(x))
    tensors = {id(parameter) for parameter in layer.parameters()}
    assert all(id(parameter) in tensors for parameter in made.parameters())
    assert list(made.state_dict()) == list(base.state_dict())
    assert torch.equal(layer(x), expected)
    assert {name: parameter.requires_grad for name, parameter in layer.named_parameters()} == flags
    assert not glora.adapters(made)


def test_a_reference_does_not_touch_a_pending_graph() -> None:
    model = attach(Residual(), exclude=["head"], trainable=["head"])
    x = torch.randn(4, 6)

    def gradients(between: Callable[[], object]) -> list[Any]:
        model.zero_grad()
        loss = model(x).square().mean()
        between()
        loss.backward()
        return [parameter.grad.clone() for parameter in glora.parameters(model)]

    expected = gradients(lambda: None)
    made = reference(model)
    for between in (lambda: made(x), lambda: reference(model)(x)):
        assert all(torch.equal(found, wanted) for found, wanted in zip(gradients(between), expected, strict=True))

    def under_disabled() -> None:
        with glora.disabled(model), torch.no_grad():
            model(x)

    assert all(torch.equal(f, wanted) for f, wanted in zip(gradients(under_disabled), expected, strict=True))


def test_a_forward_that_was_put_on_the_model_is_left_out() -> None:
    model = attach(block())
    plain = glora.remove(copy.deepcopy(model))
    original = model.forward
    model.forward = lambda x: original(x)  # closes over the adapted model, as TRL's does
    x = torch.randn(3, 6)
    assert torch.equal(reference(model)(x), plain(x))
    assert not torch.equal(model(x), plain(x))


def test_what_would_not_stay_is_refused() -> None:
    with pytest.raises(ValueError, match="found a model without any"):
        reference(block())
    model = attach(block(), freeze=False)
    with pytest.raises(ValueError, match="shares the base model's tensors; 0.weight, 0.bias, 2.weight, 2.bias train"):
        reference(model)
    with glora.merged(attach(block())) as merged, pytest.raises(RuntimeError, match="Inside glora.merged"):
        reference(merged)


class Frameworks:
    """Tiny models, words and trainers of TRL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trl: Any = pytest.importorskip("trl")
        self.transformers: Any = pytest.importorskip("transformers")
        self.datasets: Any = pytest.importorskip("datasets")
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 40}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = self.transformers.LlamaConfig(**sizes, **heads, **ids, initializer_range=0.5)
        self.transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")

    def base(self) -> Any:
        return self.transformers.LlamaForCausalLM.from_pretrained(self.folder / "base")

    def adapted(self) -> Any:
        model = self.base()
        torch.manual_seed(1)
        return attach(model, RANDOM, targets=["q_proj", "v_proj", "down_proj"])

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(36)]
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return self.transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special)

    def rows(self, kind: str) -> Any:
        def text(i: int) -> str:
            return " ".join(f"w{(5 * i + j) % 36}" for j in range(4))

        made = [{"prompt": text(i), "chosen": text(i + 1), "rejected": text(i + 2)} for i in range(16)]
        if kind == "KTO":
            made = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(made)]
        if kind in ("GRPO", "RLOO"):
            made = [{"prompt": row["prompt"]} for row in made]
        if kind == "SFT":
            made = [{"text": row["prompt"]} for row in made]
        return self.datasets.Dataset.from_list(made)

    def trainer(self, kind: str, model: Any, *mixins: Any, **given: Any) -> Any:
        settings: dict[str, Any] = {
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "disable_tqdm": True,
            "max_steps": 2,
            "save_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
        }
        extra: dict[str, Any] = {}
        if kind in ("GRPO", "RLOO"):
            settings |= {"beta": 0.1, "num_generations": 2, "max_completion_length": 6}
            extra["reward_funcs"] = lambda completions, **_: [float(len(set(c.split()))) for c in completions]
        settings |= given.pop("settings", {})
        args = getattr(self.trl, f"{kind}Config")(str(self.folder / kind / str(len(mixins))), **settings)
        parent = getattr(self.trl, f"{kind}Trainer")
        made = type("Mine", (*mixins, parent), {"__module__": __name__}) if mixins else parent
        rows = self.rows(kind)
        return made(model, args=args, train_dataset=rows, processing_class=self.tokenizer(), **extra, **given)


@pytest.fixture
def frameworks(tmp_path: Path) -> Frameworks:
    return Frameworks(tmp_path)


def history(trainer: Any, *keys: str) -> list[dict[str, float]]:
    return [{key: row[key] for key in keys} for row in trainer.state.log_history if "loss" in row]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "key"), [("DPO", "rewards/margins"), ("KTO", "rewards/chosen"), ("GRPO", "kl"), ("RLOO", "kl")]
)
def test_the_numbers_are_those_of_a_base_of_its_own(kind: str, key: str, frameworks: Frameworks) -> None:
    runs: list[Any] = []
    for mixins in ((BaseReference,), ()):
        model = frameworks.adapted()  # TRL loads the other reference from where the base came from
        trainer = frameworks.trainer(kind, model, *mixins)
        torch.manual_seed(2)
        trainer.train()
        runs.append(trainer)
    ours, separate = runs
    assert history(ours, "loss", "grad_norm", key) == history(separate, "loss", "grad_norm", key)
    assert all(row[key] != 0 and row["grad_norm"] > 0 for row in history(ours, "grad_norm", key))
    found, expected = glora.state_dict(ours.model), glora.state_dict(separate.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shared = {id(parameter) for parameter in ours.model.parameters()}
    assert all(id(parameter) in shared for parameter in ours.ref_model.parameters())
    saved = glora.load(frameworks.base(), Path(ours.args.output_dir) / "checkpoint-2")
    assert all(torch.equal(glora.state_dict(saved)[name], found[name]) for name in found)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_supervised_finetuning_comes_before_and_its_trainer_resumes(frameworks: Frameworks) -> None:
    first = frameworks.trainer("SFT", frameworks.adapted())
    first.train()
    again = frameworks.trainer("SFT", frameworks.adapted())
    again.train(resume_from_checkpoint=str(frameworks.folder / "SFT" / "0" / "checkpoint-1"))
    found, expected = glora.state_dict(again.model), glora.state_dict(first.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The forward that it has put on the model stays there.
    trainer = frameworks.trainer("DPO", first.model, BaseReference, settings={"precompute_ref_log_probs": True})
    trainer.train()
    assert all(row["rewards/margins"] != 0 for row in history(trainer, "rewards/margins"))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_a_reference_is_refused_before_training(frameworks: Frameworks) -> None:
    for settings, given_, match in (
        ({"sync_ref_model": True}, {}, "found sync_ref_model=True"),
        ({}, {"ref_model": nn.Linear(1, 1)}, "found another ref_model"),
    ):
        with pytest.raises(ValueError, match=match):
            frameworks.trainer("DPO", frameworks.adapted(), BaseReference, settings=settings, **given_)
    with pytest.raises(ValueError, match="needs the adapted model itself; found 'base'"):
        frameworks.trainer("DPO", "base", BaseReference)
    plain = type("Plain", (BaseReference, frameworks.transformers.Trainer), {"__module__": __name__})
    with pytest.raises(RuntimeError, match="found Plain, which does neither"):
        plain(frameworks.adapted())
