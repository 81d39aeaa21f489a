"""kohya's and LyCORIS's files, of one model or of several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from glora.interop.base import base_of, with_statistics
from glora.interop.lycoris.held import Held, held_by
from glora.interop.lycoris.read import read_lycoris
from glora.interop.lycoris.write import write_lycoris
from glora.model.attach import attach_specs
from glora.model.state import describe

Models = TypeVar("Models", bound="nn.Module | Mapping[str, nn.Module]")


def load_lycoris(
    model: Models,
    file: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = True,
    rs_lora: bool = False,
    strict: bool = False,
) -> Models:
    r"""Attach an adapter that kohya's scripts, LyCORIS or diffusers saved, to one model or to several at once.

    It computes what LyCORIS's own modules do, on linear layers and convolutions, with

    | file | glora |
    |---|---|
    | LoRA, LoCon (`lora_mid` too) | B, `alpha / rank` |
    | LoHa, LoKr | B, of the rank of W0 at most |
    | `dora_scale` beside these | A vector, g - 1, and B: $g = m / \|W_0 + \Delta\|$, by rows or by input channels |
    | GLoRA | A and B low rank, `product="matmul"` |
    | IA3 | A vector, by rows or (`on_input`) by input channels |
    | full (`diff`, `diff_b`) | B of the rank that it has, and E |
    | norms (`w_norm`, `b_norm`) | heads |

    Names are matched with the models' own paths: kohya's and LyCORIS's (underscores for dots; `text_model` in front or
    not; those of Stable Diffusion's own UNet for SDXL's) and diffusers'. Both layouts of GLoRA are read, that since
    version 3 of LyCORIS and that before. LyCORIS is not needed. What each layer has is turned into these forms beside
    its base weight where that is needed, and all models are changed or none.

    Args:
        model: the model; the names in the file must be one prefix and its layers' paths. Or a mapping from prefix to
            model, `{"lora_unet": unet, "lora_te": text_encoder}`, for a file of several.
        file: `.safetensors`, or what `torch.save` wrote (read as tensors alone).
        name: the adapter's name in the model, or in each.
        trainable: whether its tensors ask for gradients.
        rs_lora: whether its GLoRA was trained with LyCORIS's `rs_lora`, scaled by `alpha / sqrt(rank)` instead of
            `alpha / rank`. The file does not say, and LyCORIS itself reads every file as without. Other methods' files
            have an alpha that already says it.
        strict: for files that glora wrote: whether another base is an error, or a warning; see `glora.load`.

    Returns:
        What was given; the adapter is the only active one.

    Raises:
        glora.AdapterFileError: a damaged file, a name that no model has, a layer of another shape or of a kind that it
            cannot be on, another method (OFT: the formula has no place for a rotation of W0). Nothing has changed then.
        ValueError: one model for two prefixes.
        FileNotFoundError: no file.

    Source: LyCORIS 4.1, `lycoris/modules`; kohya's sd-scripts, `networks/lora.py`.
    """
    file = Path(file)
    models: dict[str | None, nn.Module] = {**model} if isinstance(model, Mapping) else {None: model}
    _check_models(models)
    held: dict[str | None, dict[str, Held]] = {prefix: held_by(base_of(each)) for prefix, each in models.items()}
    adapters = read_lycoris(file, held, rs_lora=rs_lora)
    targets = [(models[prefix if prefix in models else None], adapter) for prefix, adapter in adapters.items()]
    attach_specs(targets, file, name=name, trainable=trainable, strict=strict)
    return model


def save_lycoris(
    model: nn.Module | Mapping[str, nn.Module],
    file: str | os.PathLike[str],
    name: str | None = None,
    *,
    prefix: str = "lycoris",
    rs_lora: bool = False,
) -> None:
    """Write one adapter as kohya's scripts and LyCORIS read it, or those of several models into one file.

    | forms | file |
    |---|---|
    | B low rank | LoRA; LoCon on a convolution |
    | A low rank of a matrix product, with B or without | GLoRA, where A mixes channels alone |
    | the same on kernels larger than 1 x 1 otherwise | LoCon: A as W0 L R, beside the base |
    | A a vector, alone | IA3 |
    | A a vector, and B | LoRA or LoCon with `dora_scale` |

    A LoRA, LoCon or GLoRA that `load_lycoris` read goes back to the bit.

    Args:
        model: the model; or a mapping from prefix to model, `{"lora_unet": unet, "lora_te": text_encoder}`.
        file: the `.safetensors` file to write.
        name: the adapter; None for the only one.
        prefix: what stands before each path, for one model: "lora_unet" and "lora_te" are Stable Diffusion's.
        rs_lora: write the alpha of GLoRA for a network that is made with `rs_lora`; the file does not say which it is.

    Raises:
        ValueError: what the format cannot hold, by name: other forms of A or B, any C, D or E, a head, other layers.
            Nothing is written then.
        KeyError: no adapter of that name.

    Source: LyCORIS 4.1, `lycoris/modules`; kohya's sd-scripts, `networks/lora.py`.
    """
    models = {**model} if isinstance(model, Mapping) else {prefix: model}
    _check_models(models)
    adapters = {prefix: with_statistics(describe(each, name), base_of(each)) for prefix, each in models.items()}
    write_lycoris(Path(file), adapters, {p: base_of(each) for p, each in models.items()}, rs_lora=rs_lora)


def _check_models(models: Mapping[str, nn.Module] | Mapping[str | None, nn.Module]) -> None:
    """Raise ValueError for no models, prefixes that are none, or one model twice."""
    if not models or not all(isinstance(prefix, str) or prefix is None for prefix in models):
        raise ValueError(f"Several models are a mapping from prefix to model; found the prefixes {list(models)}.")
    seen: dict[int, str | None] = {}
    for prefix, model in models.items():
        for module in model.modules() if isinstance(model, nn.Module) else ():  # pyright: ignore
            if seen.setdefault(id(module), prefix) != prefix:
                raise ValueError(
                    f"Each prefix has a model of its own; those of {seen[id(module)]!r} and {prefix!r} have a "
                    f"{type(module).__name__} in common."
                )


__all__ = ["load_lycoris", "read_lycoris", "save_lycoris", "write_lycoris"]
