"""Hugging Face PEFT: its GLoRA both ways; LoRA, IA3 and HiRA into glora."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from glora.files.container import adapter_file
from glora.interop.peft.read import read_peft
from glora.interop.peft.write import write_peft
from glora.model.attach import attach_spec
from glora.model.state import describe
from glora.model.walk import Model


def load_peft(
    model: Model,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = True,
    strict: bool = False,
) -> Model:
    r"""Attach an adapter that PEFT's `save_pretrained` wrote: GLoRA, LoRA, IA3 or HiRA.

    It computes what PEFT's does, with

    | PEFT | glora |
    |---|---|
    | GLORA | A to E, elementwise |
    | LORA | B (`alpha / r` or, with rslora, `alpha / sqrt(r)`; rank and alpha patterns); its lora_bias is E |
    | HIRA | A, elementwise |
    | IA3 | A and D vectors (outputs), or an A vector of the matrix product (inputs) |
    | modules_to_save | heads, as by `trainable=` |

    PEFT itself is not needed. Dropout of the input (lora_dropout, in training only) is left out.

    Args:
        model: the base model that PEFT wrapped.
        directory: the folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients.
        strict: for files that glora wrote: whether another base is an error, or a warning; see `glora.load`.

    Returns:
        The model; the adapter is the only active one.

    Raises:
        glora.AdapterFileError: files that are damaged, of another method, do not fit the model, or need something that
            glora does not do (DoRA, trained base biases, starts that change the base weights), by name.
        FileNotFoundError: no such files.

    Source: Hugging Face PEFT 0.21.
    """
    file = adapter_file(directory)
    return attach_spec(model, read_peft(file.parent), file, name=name, trainable=trainable, strict=strict)


def save_peft(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter as PEFT's GLoRA does, for `PeftModel.from_pretrained(base_model, directory)`.

    The files are `adapter_model.safetensors` and `adapter_config.json`; a `glora_config.json` in the folder describes
    the adapter that is replaced, and is removed. `alpha / rank` is multiplied into the left factors, since PEFT's GLoRA
    has no alpha. Rank dropout is left out.

    Args:
        model: the model.
        directory: the folder; made if it is not there.
        name: the adapter; None for the only one.

    Raises:
        ValueError: what PEFT's GLoRA cannot hold, by name: A and B (or D and E) of different forms in one layer, layers
            that differ in forms or rank, a matrix product, a created bias. Nothing is written then.
        KeyError: no adapter of that name.

    Source: Hugging Face PEFT 0.21, `peft/tuners/glora`.
    """
    write_peft(Path(directory), describe(model, name))
