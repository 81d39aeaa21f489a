"""Hugging Face PEFT: what its methods have that the formula holds, both ways."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from glora.files.container import adapter_file
from glora.interop.base import base_of
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
    r"""Attach an adapter that PEFT's `save_pretrained` wrote.

    It computes what PEFT's does, with

    | PEFT | glora |
    |---|---|
    | GLORA | A to E, elementwise |
    | LORA | B (`alpha / r` or, with rslora, `alpha / sqrt(r)`; rank and alpha patterns); its lora_bias is E |
    | LORA with DoRA | A vector, g - 1, beside B: $g$ is the magnitude over the norm of $W_0 + sBA$ |
    | HIRA | A, elementwise |
    | IA3 | A and D vectors (outputs), or an A vector of the matrix product (inputs) |
    | ADALORA, VERA, VBLORA, MISS | B |
    | LOHA, LOKR, RANDLORA | B, of the rank of W0 at most |
    | modules_to_save, LN_TUNING, embeddings that were resized | heads, as by `trainable=` |
    | trainable_token_indices, TRAINABLE_TOKENS | B of rank k, the number of rows: `left` picks them, `right` adds |
    | bias="all", "lora_only" | E; the module of a bias without weights that can be adapted is a head |

    on linear layers, Conv1D, convolutions, embeddings and experts (`target_parameters`) as PEFT has them. PEFT itself
    is not needed. Dropout of the input (lora_dropout, in training only) is left out. Files of torch.save
    (`adapter_model.bin`) are read as tensors alone, and run no code.

    Trained rows take k * (tokens + features) numbers; where that is more than the embedding has, and where it is tied
    to other modules or has a forward of its own, they are a head, the whole embedding. Trained further here, either
    moves the rows of other tokens too.

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
            glora does not do (rotations of W0, prompts, starts that change the base weights), by name.
        FileNotFoundError: no such files.

    Source: Hugging Face PEFT 0.21.
    """
    path = Path(directory)
    folder = path if path.is_dir() else adapter_file(path).parent
    spec = read_peft(folder, base_of(model))
    return attach_spec(model, spec, folder, name=name, trainable=trainable, strict=strict)


def save_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    as_: str = "auto",
    rank: int | None = None,
    tolerance: float | None = None,
) -> dict[str, float]:
    r"""Write one adapter as PEFT has it, for `PeftModel.from_pretrained(base_model, directory)` and servers.

    The files are `adapter_model.safetensors` and `adapter_config.json`; a `glora_config.json` in the folder describes
    the adapter that is replaced, and is removed. Rank dropout is left out. "auto" takes the first method that computes
    the same:

    | as_ | what it holds |
    |---|---|
    | "tokens" | trained rows of embeddings as `load_peft` reads them; "lora" for the other layers |
    | "lora" | B; a low-rank A of a matrix product, as $W_0 L R$; C, D and E as one `lora_bias`; any ranks, alphas |
    | "hira" | a low-rank A, elementwise, alone |
    | "ia3" | A and D the same vector (outputs), or a vector A of the matrix product (inputs) |
    | "glora" | A and B of one form and D and E of another, in all layers alike; elementwise |
    | "dora" | a vector A beside B, with C, D and E in the layer's own bias (LoRA with `use_dora`) |

    A LoRA that `load_peft` has read goes back to the bit.

    Args:
        model: the model.
        directory: the folder; made if it is not there.
        name: the adapter; None for the only one.
        as_: the method, or "auto".
        rank: with `as_="lora"`: each layer whose update is no LoRA, or one of a higher rank, is written as the nearest
            of this rank, by truncated singular value decomposition of the whole update. The errors are printed.
        tolerance: the largest relative error that a layer may have.

    Returns:
        Layer path to the relative error of its update, $\|\Delta - \Delta_r\| / \|\Delta\|$; 0.0 where exact.

    Raises:
        ValueError: no method, or not this one, holds the adapter, by name and layer; an error above `tolerance`.
            Nothing is written then.
        KeyError: no adapter of that name.

    Source: Hugging Face PEFT 0.21; the approximation is that of Eckart and Young (1936).
    """
    return write_peft(Path(directory), describe(model, name), base_of(model), as_, rank, tolerance)
