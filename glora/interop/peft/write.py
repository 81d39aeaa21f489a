"""An adapter as the method of PEFT that its forms are (Note [PEFT's forms])."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from glora.files.container import ADAPTER_FILE, CONFIG_FILE, PEFT_CONFIG_FILE, replace_files
from glora.interop.base import Base, with_statistics
from glora.interop.peft.lora import Written, write_lora
from glora.interop.peft.methods import PREFIX
from glora.interop.peft.others import write_dora, write_glora, write_hira, write_ia3
from glora.interop.tensors import tensor_file
from glora.spec import AdapterSpec, join
from glora.text import format_problems, table

Writer = Callable[[AdapterSpec, Base], Written]

# In the order that "auto" tries them: what most other programs read comes first.
WRITERS: dict[str, Writer] = {
    "lora": write_lora,
    "hira": write_hira,
    "ia3": write_ia3,
    "glora": write_glora,
    "dora": write_dora,
}


def write_peft(
    directory: Path,
    adapter: AdapterSpec,
    base: Base = Base(),  # noqa: B008 - immutable
    as_: str = "auto",
    rank: int | None = None,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Write an adapter's files; see `save_peft`.

    Raises:
        ValueError: the method cannot hold it, or not nearly enough; nothing is written.
    """
    adapter = with_statistics(adapter.folded(), base)
    written = _written(adapter, base, as_, rank)
    errors = {path: written.errors.get(path, 0.0) for path in adapter.layers}
    _check(errors, tolerance)
    tensors = {PREFIX + key: tensor for key, tensor in written.tensors.items()}
    for path, names in adapter.heads.items():
        tensors |= {f"{PREFIX}{join(path, name)}": adapter.tensors[join(path, name)] for name in names}
    saved = sorted({_saved_path(path, adapter, base) for path in adapter.heads}) or None
    config = {**_common(base), **written.config, "modules_to_save": saved}
    if adapter.ties:  # of which PEFT has the tensor under both keys
        tensors |= {PREFIX + key: adapter.tensors[owner] for key, owner in adapter.ties.items()}
        config["ensure_weight_tying"] = True
    contents = {
        directory / ADAPTER_FILE: tensor_file(tensors, adapter.base),
        directory / PEFT_CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    replace_files(contents, obsolete=[directory / CONFIG_FILE])
    return errors


def _written(adapter: AdapterSpec, base: Base, as_: str, rank: int | None) -> Written:
    if as_ != "auto" and as_ not in WRITERS:
        raise ValueError(f"as_ must be 'auto' or one of {', '.join(map(repr, WRITERS))}; found {as_!r}.")
    if rank is not None and (as_ != "lora" or type(rank) is not int or rank < 1):
        raise ValueError(f"rank= is the most that as_='lora' may take, an int of at least 1; found {rank!r}, {as_!r}.")
    problems: list[str] = []
    if adapter.ties and not _ties_embeddings(adapter, base):
        problems += [f"{key!r} is tied to {owner!r}, and PEFT's copy is not" for key, owner in adapter.ties.items()]
    if "" in adapter.layers or "" in adapter.heads:
        problems.append("it is on the model itself, and PEFT adapts layers inside of a model")
    if not adapter.layers:
        problems.append("it adapts no layer")
    problems += [
        f"{path!r} is read by MultiheadAttention and never called, and PEFT's layer in its place would do nothing"
        for path in adapter.layers
        if path in base.owners and isinstance(base.owners[path].module, NonDynamicallyQuantizableLinear)
    ]
    names = [as_] if as_ != "auto" else _order(adapter)
    if adapter.ties and not problems:  # which PEFT's other methods would lose
        names = [name for name in names if name in ("lora", "dora")]
    for name in names if not problems else ():
        try:
            return write_lora(adapter, base, rank) if name == "lora" else WRITERS[name](adapter, base)
        except ValueError as error:  # noqa: PERF203 - a handful
            problems.append(f"as {name}, {error}")
    raise ValueError(
        f"A method of PEFT must compute what the adapter does; none does (as_={as_!r}), and nothing was written. "
        f"Found: {format_problems(problems)}. as_='lora' with a rank= writes the nearest LoRA, and tells the error; "
        f"glora.save keeps the adapter as it is."
    )


def _order(adapter: AdapterSpec) -> list[str]:
    """The methods to try. Paths of the bias alone are GLoRA's before they are a LoRA of zeros."""
    has_weight = any(layer.config.A != "none" or layer.config.B != "none" for layer in adapter.layers.values())
    return list(WRITERS) if has_weight else sorted(WRITERS, key=lambda name: name != "glora")


def _check(errors: dict[str, float], tolerance: float | None) -> None:
    """Print the errors where there are some; raise where one is too large."""
    told = {path: error for path, error in errors.items() if error}
    if told:
        worst = max(told, key=lambda path: told[path])
        rows = [[path, f"{error:.2e}"] for path, error in told.items()]
        print(table(f"{len(told)} of {len(errors)} layers are approximated", ["module", "relative error"], rows))
        if tolerance is not None and not told[worst] <= tolerance:
            raise ValueError(
                f"The relative error of each layer's update must be at most tolerance={tolerance}; {worst!r} has "
                f"{told[worst]:.2e}, and nothing was written. Give a larger rank= or tolerance=."
            )


def _embeddings(base: Base) -> tuple[str | None, str | None]:
    """The paths of the model's input and output embeddings."""
    found = [getattr(base.model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    paths = [[path for path, owner in base.owners.items() if owner.module is module] for module in found]
    first, second = (next(iter(aliases), None) for aliases in paths)
    return first, second


def _ties_embeddings(adapter: AdapterSpec, base: Base) -> bool:
    """Whether all that is tied is the weight of the input embeddings to that of the output's: PEFT can keep that."""
    pair = {join(path, "weight") for path in _embeddings(base) if path is not None}
    heads = {key.rpartition(".")[0] for key in adapter.ties.values()}
    alone = all(adapter.heads[path] == ("weight",) for path in heads)
    return len(pair) == 2 and alone and {*adapter.ties, *adapter.ties.values()} == pair


def _saved_path(path: str, adapter: AdapterSpec, base: Base) -> str:
    """The module that PEFT's config has for a head: of tied embeddings the input's."""
    inputs, _ = _embeddings(base) if adapter.ties else (None, None)
    return inputs if inputs is not None and join(path, "weight") in adapter.ties.values() else path


def _common(base: Base) -> dict[str, Any]:
    """The fields that all of PEFT's methods have."""
    return {
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": getattr(base.model, "name_or_path", None) or None,
        "task_type": None,
        "revision": None,
    }
