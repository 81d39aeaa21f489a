"""The names of layers in kohya's and LyCORIS's files, and the model's paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from glora.interop.lycoris.held import Held
from glora.spec import AdapterFileError
from glora.text import format_names, quote_names

# Note [LyCORIS's names]
# A layer's name is a prefix ("lycoris", "lora_unet", "lora_te", ...) and its path with underscores for dots. Paths have
# underscores too, so that a name can only be matched with the paths of the model. diffusers' own files have dots,
# behind "unet" or "text_encoder": they are read as underscores. Two parts of a path are spelled in more than one way:
#
# - "text_model", which transformers 5 has no more in front of a CLIP text encoder's layers, and files have.
# - A UNet of diffusers' has other paths than Stable Diffusion's own code, by which kohya names the layers of SDXL:
#   `input_blocks` for `down_blocks`, each block of which is numbered through.

Names = Mapping[str, Mapping[str, Held]]  # prefix to name behind it to module


def resolve(names: Iterable[str], models: Mapping[str | None, Mapping[str, Held]], file: Path) -> Names:
    """Each name of a file to the module that it is for.

    Args:
        names: those of the file.
        models: prefix to a model's modules by path; None, for one model alone, is the one prefix that all names have.
        file: for messages.

    Returns:
        Prefix to name to module.

    Raises:
        AdapterFileError: a name that no model has, a prefix without names, a name of two modules.
    """
    names = sorted(names)
    spelled = {prefix: _spelled(held) for prefix, held in models.items()}
    if None in spelled:
        spelled = {_common_prefix(names, spelled[None], file): spelled[None]}
    found: dict[str, dict[str, Held]] = {prefix: {} for prefix in spelled if prefix is not None}
    unknown: list[str] = []
    for name in names:
        means = [
            (prefix, held)
            for prefix, modules in spelled.items()
            if prefix is not None and name.startswith(front(prefix))
            for held in modules.get(name.removeprefix(front(prefix)), ())
        ]
        if len(means) > 1:
            paths = quote_names(held.path for _, held in means)
            raise AdapterFileError(f"{file} names layers by one name, {name!r}, for several: {paths}.")
        if not means:
            unknown.append(name)
        for prefix, held in means:
            found[prefix][name] = held
    if unknown:
        raise AdapterFileError(_unknown(unknown, spelled, file))
    empty = [prefix for prefix, modules in found.items() if not modules]
    if empty:
        raise AdapterFileError(
            f"Each prefix must have layers in the file; {file} has none of {quote_names(empty)}, and has "
            f"{format_names(_prefixes(names))}. Leave out the models that it is not for."
        )
    return found


def front(prefix: str) -> str:
    """What stands before a path, with its underscore."""
    return f"{prefix}_" if prefix else ""


def flat(path: str) -> str:
    """A path as it stands in a name."""
    return path.replace(".", "_")


def _spelled(held: Mapping[str, Held]) -> dict[str, list[Held]]:
    """Name behind the prefix to the modules that it may mean: paths themselves come before other spellings."""
    found: dict[str, dict[object, Held]] = {}
    for path, module in held.items():
        if path:
            found.setdefault(flat(path), {}).setdefault(module.key, module)
    others: dict[str, dict[object, Held]] = {}
    has_text_model = any(path.startswith("text_model.") for path in held)
    for path, module in held.items():
        for other in (*_text_spellings(path, has_text_model), *_unet_spellings(path, held)):
            if flat(other) not in found:
                others.setdefault(flat(other), {}).setdefault(module.key, module)
    return {name: list(modules.values()) for name, modules in (found | others).items()}


def _text_spellings(path: str, has_text_model: bool) -> Iterator[str]:
    if has_text_model and path.startswith("text_model."):
        yield path.removeprefix("text_model.")
    elif not has_text_model and path.startswith(("encoder.", "embeddings.", "final_layer_norm")):
        yield f"text_model.{path}"


_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _unet_spellings(path: str, held: Mapping[str, Held]) -> Iterator[str]:
    """The path in Stable Diffusion's own code of a layer in diffusers' UNet (Note [LyCORIS's names])."""
    if "down_blocks.0.resnets.0.conv1" not in held:
        return
    if path in _OUTSIDE:
        yield _OUTSIDE[path]
    elif (middle := _MIDDLE.fullmatch(path)) is not None:
        kind, number, rest = middle.groups()
        at, rest = (2 * int(number), _IN_RESNET.get(rest, rest)) if kind == "resnets" else (2 * int(number) + 1, rest)
        yield f"middle_block.{at}.{rest}"
    elif (block := _BLOCK.fullmatch(path)) is not None:
        side, outer, kind, inner, rest = block.groups()
        resnets = sum(f"down_blocks.0.resnets.{n}.conv1" in held for n in range(100))
        outer, inner = int(outer), int(inner)
        each = resnets + 1
        if kind == "downsamplers":
            yield f"input_blocks.{each * (outer + 1)}.0.{rest.replace('conv', 'op')}"
        elif kind == "upsamplers":
            attends = any(p.startswith(f"up_blocks.{outer}.attentions.") for p in held)
            yield f"output_blocks.{each * outer + resnets}.{2 if attends else 1}.{rest}"
        else:
            at = each * outer + inner
            name = f"input_blocks.{at + 1}" if side == "down" else f"output_blocks.{at}"
            yield f"{name}.0.{_IN_RESNET.get(rest, rest)}" if kind == "resnets" else f"{name}.1.{rest}"


def _common_prefix(names: list[str], spelled: Mapping[str, list[Held]], file: Path) -> str:
    """The one prefix of all names of a file for one model."""
    candidates = Counter(prefix for name in names for prefix in _candidates(name, spelled))
    if not candidates:
        raise AdapterFileError(_unknown(names, {None: spelled}, file))
    # All names, if it can be; LyCORIS's own first; then the shortest.
    best = min(candidates, key=lambda prefix: (-candidates[prefix], prefix != "lycoris", len(prefix), prefix))
    if candidates[best] < len(names):
        raise AdapterFileError(
            _unknown([name for name in names if best not in _candidates(name, spelled)], {best: spelled}, file)
        )
    return best


def _candidates(name: str, spelled: Mapping[str, list[Held]]) -> Iterator[str]:
    """The prefixes behind which a name is one of the model's; none for the whole name."""
    if name in spelled:
        yield ""
    start = name.find("_")
    while start >= 0:
        if name[start + 1 :] in spelled:
            yield name[:start]
        start = name.find("_", start + 1)


def _prefixes(names: Iterable[str]) -> list[str]:
    """The beginnings of names as people know them: the first two words, one for LyCORIS's own."""
    words = [re.match(r"(?:lora|lycoris)(?:_(?:unet|te\d*|transformer|prior|clip_[lgh]))?|[^_]+", n) for n in names]
    return list(dict.fromkeys(match[0] for match in words if match))


def _unknown(names: list[str], spelled: Mapping[Any, Mapping[str, list[Held]]], file: Path) -> str:
    """What is said of names that no model has: another model's, or misspelt."""
    behind = [prefix for prefix in spelled if prefix is not None]
    own = [name for name in names if any(name.startswith(front(prefix)) for prefix in behind)]
    if behind and not own:
        return (
            f"Each name in a file must be a layer of a model; {file} also has {format_names(names)}, of another model "
            f"than that of {quote_names(behind)}. Load it into all models that it is for: "
            f"load_lycoris({{{', '.join(f'{p!r}: ...' for p in [*behind, *_prefixes(names)])}}}, file)."
        )
    known = sorted(front(prefix or "") + name for prefix, modules in spelled.items() for name in modules)
    near = [match for name in own[:1] for match in get_close_matches(name, known, 1)]
    return (
        f"The names in {file} must be a prefix and the model's paths with underscores for dots; there is no layer for "
        f"{format_names(own or names)}"
        + (f" (the nearest is {near[0]!r})" if near else "")
        + f". The model has {format_names(known)}."
    )
