"""Train an adapter of a causal language model with transformers' Trainer, and another with TRL's DPO.
It takes a minute on two CPU cores, and downloads nothing: the model is small and random, the text Python's own manual.

    pip install -e ".[examples,trainer]"     # and trl, for --dpo
    python examples/causal_trainer.py --dpo
"""

# %% [markdown]
# ## The task
#
# A small Llama, whose tokens are single characters, is trained on a part of Python's manual. Then an adapter learns
# another part, in capitals. The Trainer takes the adapted model as it is: its checkpoints hold the adapter alone, and
# it resumes from them.
#
# With a model of your own, replace `base()` by `AutoModelForCausalLM.from_pretrained(...)` and `tokens` by your
# tokenizer and data set.

# %%
from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch
from shared import OUT, draw
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import glora
from glora.text import table

# %% [markdown]
# ## Text as numbers
#
# A token is one printable ASCII character or a newline. Four special tokens come first: padding, start, end, unknown.

# %%
LETTERS = "\n" + "".join(map(chr, range(32, 127)))
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LENGTH = 64
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def tokens(text: str) -> list[dict[str, Tensor]]:
    """The text as rows of `LENGTH` tokens, in the format of the Trainer."""
    ids = torch.tensor([len(SPECIAL) + LETTERS.index(letter) for letter in text if letter in LETTERS])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def base() -> Any:
    """A small Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(LETTERS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


# %% [markdown]
# ## The Trainer


# %%
def arguments(folder: Path, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Arguments that the Trainer and DPO have in common."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "save_steps": max(1, steps // 2),
        "logging_steps": max(1, steps // 20),
        "learning_rate": lr,
        "per_device_train_batch_size": 16,
        "report_to": [],
        "use_cpu": True,
        "seed": seed,
    }


def train(model: Any, text: str, folder: Path, steps: int, lr: float, seed: int) -> dict[int, float]:
    """Train, from the folder's last checkpoint if there is one; return the loss at each step that was logged."""
    trainer = Trainer(model, TrainingArguments(**arguments(folder, steps, lr, seed)), train_dataset=tokens(text))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


@torch.no_grad()
def loss_on(model: Any, text: str) -> float:
    """The mean loss of the first rows of a text."""
    rows = torch.stack([row["input_ids"] for row in tokens(text)[:32]])
    return float(model.eval()(input_ids=rows, labels=rows).loss)


# %% [markdown]
# ## DPO, with the base as the reference
#
# DPO compares the model with a reference: the model as it was before DPO. `BaseReference` uses the base model, which is
# in memory under the adapter anyway, so there is no second model.
#
# The reference must have what the first adapter learned. So that adapter is merged first, and DPO trains a new one: its
# base is the merged model. Here short answers are preferred.


# %%
def dpo(model: Any, folder: Path, steps: int, seed: int) -> dict[int, float]:
    """Merge the first adapter, and train a new one on preferences; return the losses, which start at log(2)."""
    from datasets import Dataset
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    from glora.integrations.trl import BaseReference

    class Preferences(BaseReference, DPOTrainer):
        pass

    ids = {token: index for index, token in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    rows = [
        {"prompt": f"WHAT IS {word}? ", "chosen": f"A {word}.", "rejected": f"IT IS {word}, {word}."}
        for word in map(str.upper, sorted(topics))
    ]
    settings = {**arguments(folder, steps, 2e-4, seed), "bf16": False, "per_device_train_batch_size": 8}
    glora.apply(glora.merge(model), TARGETS, glora.GLoRAConfig.lora(rank=8), name="preferences")
    trainer = Preferences(
        model,
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=128, **names),
    )
    trainer.train()
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


# %% [markdown]
# ## All together


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=200, help="steps of the base model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each adapter (default: %(default)s)")
    parser.add_argument("--dpo", action="store_true", help="also train on preferences with DPO; needs trl")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT / "causal", help="output folder (default: %(default)s)")
    chosen = parser.parse_args([] if "ipykernel" in sys.modules else None)
    warnings.simplefilter("ignore", FutureWarning)
    set_seed(chosen.seed)

    manual = "\n".join(topics[key] for key in sorted(topics))
    first, second = manual[:200_000], "\n".join(line.upper() for line in manual[200_000:260_000].splitlines())
    held_out = "\n".join(line.upper() for line in manual[300_000:310_000].splitlines())
    model = base()
    curves = {
        "the base, on the manual": train(model, first, chosen.out / "base", chosen.pretraining, 3e-3, chosen.seed)
    }
    rows = [["the base", "0", f"{loss_on(model, held_out):.3f}"]]

    glora.apply(model, TARGETS, glora.GLoRAConfig.lora(rank=8))
    curves["the adapter, on capitals"] = train(model, second, chosen.out / "run", chosen.steps, 5e-3, chosen.seed)
    rows.append(["with the adapter", f"{glora.summary(model).trainable:,}", f"{loss_on(model, held_out):.3f}"])
    glora.save(model, chosen.out / "adapter")
    with glora.disabled(model):
        rows.append(["the base again, adapter disabled", "0", f"{loss_on(model, held_out):.3f}"])
    if chosen.dpo:
        curves["DPO, its own loss"] = dpo(model, chosen.out / "dpo", chosen.steps, chosen.seed)
        glora.save(model, chosen.out / "preferences")
    print(table("text in capitals", ["model", "trained", "loss"], rows))
    draw(curves, chosen.out / "learning_curve.png")


if __name__ == "__main__":
    main()
