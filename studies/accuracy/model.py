"""A pretrained encoder with a linear head, and one training of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import needs
from studies.accuracy.data import Split

BATCH, EPOCHS = 32, 5
# The new head needs another learning rate than what is pretrained, and the same one whatever the method.
HEAD_LR = 5e-3

# An encoder and a batch of inputs to its features: (batch, width).
Read = Callable[[Any, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Encoded:
    """What the encoder reads, one tensor an example (a text's token ids, an image), and the class of each."""

    inputs: list[Tensor]
    labels: Tensor


class Classifier(nn.Module):
    """A linear head on an encoder's features.

    Args:
        encoder: pretrained.
        width: of the features.
        targets: the layers of the encoder that are adapted.
        read: computes the features.
        classes: of the head.
    """

    def __init__(self, encoder: nn.Module, width: int, targets: Sequence[str], read: Read, classes: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.targets = list(targets)
        self._read = read
        self.head = nn.Linear(width, classes)

    def features(self, inputs: Sequence[Tensor]) -> Tensor:
        """Of each example: (examples, width)."""
        return self._read(self.encoder, inputs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.head(self.features(inputs))


@dataclass(frozen=True)
class Pretrained:
    """An encoder, read once, and how to use it; see Classifier.

    Attributes:
        tensors: examples as a task has them (texts, an image's bytes) to what the encoder reads.
    """

    encoder: Any
    width: int
    targets: Sequence[str]
    read: Read
    tensors: Callable[[Sequence[Any]], list[Tensor]]

    def classifier(self, classes: int, seed: int) -> Classifier:
        """A copy with a new head, drawn from the seed."""
        torch.manual_seed(seed)
        return Classifier(copy.deepcopy(self.encoder), self.width, self.targets, self.read, classes)

    def encode(self, split: Split) -> Encoded:
        return Encoded(self.tensors(split.inputs), torch.tensor(split.labels))


def batches(encoded: Encoded, generator: torch.Generator, jitter: float = 4.0) -> Iterator[Tensor]:
    """Every example once, in random batches of about one length: fully shuffled, texts take 40% more tokens."""
    lengths = torch.tensor([float(len(each)) for each in encoded.inputs])
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
    steps = epochs * -(-len(encoded.inputs) // BATCH)
    schedule = needs("transformers").get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    losses: list[float] = []
    began = time.process_time()
    model.train()
    for _ in range(epochs):
        for rows in batches(encoded, generator):
            loss = F.cross_entropy(model([encoded.inputs[i] for i in rows]), encoded.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses, time.process_time() - began


@torch.no_grad()
def features(model: Classifier, encoded: Encoded) -> Tensor:
    """The frozen features of all examples, in their order, computed in batches of one length."""
    order = sorted(range(len(encoded.inputs)), key=lambda i: len(encoded.inputs[i]))
    groups = [order[i : i + 2 * BATCH] for i in range(0, len(order), 2 * BATCH)]
    found = torch.cat([model.features([encoded.inputs[i] for i in group]) for group in groups])
    return found[torch.tensor(order).argsort()]


@torch.no_grad()
def accuracy(model: Classifier, encoded: Encoded) -> float:
    """Share of right answers, in percent."""
    return 100 * (model.head(features(model, encoded)).argmax(1) == encoded.labels).float().mean().item()
