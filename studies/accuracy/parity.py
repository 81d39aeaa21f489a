"""Does glora train as PEFT's GLoRA does? From equal tensors, the same steps: `python -m studies.accuracy.parity`.

Two classifiers get the same tensors (PEFT's start, read by `glora.interop.load_peft`), the same batches and the same
optimizer, without dropout. Reported: the largest difference of the losses, and of the logits once both are merged.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import torch
from torch import nn

import glora
from benchmarks.peers import peft_model
from studies.accuracy.data import TASKS, splits
from studies.accuracy.model import Classifier, Group, features, train
from studies.accuracy.runs import MODELS

SIZES = (400, 300, 600)
LOSSES, LOGITS = 1e-4, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.accuracy.parity", description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="trec6", metavar="TASK")
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pretrained, parts = MODELS[TASKS[options.task].model](), splits(options.task, 0, SIZES)
    plain = pretrained.classifier(parts.classes, seed=0)
    for module in list(plain.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    forms = {"config_A_B": "lora", "config_C": "vector", "config_D_E": "vector"}
    theirs.encoder = peft_model(theirs.encoder, "GloraConfig", options.rank, target_modules=theirs.targets, **forms)
    with tempfile.TemporaryDirectory() as folder:
        theirs.encoder.save_pretrained(folder)
        glora.interop.load_peft(ours.encoder, folder)
    encoded = pretrained.encode(parts.train)

    def losses(model: Classifier, parameters: list[nn.Parameter]) -> list[float]:
        return train(model, [Group(parameters)], encoded, lr=options.lr, seed=0)[0]

    first = losses(theirs, [p for p in theirs.encoder.parameters() if p.requires_grad])
    second = losses(ours, list(glora.parameters(ours.encoder)))
    apart = max(abs(a - b) for a, b in zip(first, second, strict=True))

    test: Any = pretrained.encode(parts.test)
    before = _logits(ours, test)
    glora.merge(ours.encoder)
    theirs.encoder = theirs.encoder.merge_and_unload()
    merged = (_logits(ours, test) - _logits(theirs, test)).abs().max().item()
    itself = (_logits(ours, test) - before).abs().max().item()
    steps = f"{len(first)} steps on {options.task}, rank {options.rank}, lr {options.lr:g}"
    print(f"{steps}: loss {first[0]:.3f} to {first[-1]:.3f}")
    print(f"largest difference of a loss to PEFT's: {apart:.1e} (at most {LOSSES:g})")
    print(f"merged, largest difference of a logit of {len(before)} test examples: {merged:.1e} (at most {LOGITS:g})")
    print(f"ours merged and not merged: {itself:.1e}")
    if apart > LOSSES or merged > LOGITS:
        raise SystemExit("not equal")


@torch.no_grad()
def _logits(model: Classifier, encoded: Any) -> torch.Tensor:
    return model.head(features(model, encoded))


if __name__ == "__main__":
    main()
