"""The model card of a saved adapter: what a hub, or a person who opens the folder, reads first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from glora.spec import AdapterSpec, LayerSpec, join
from glora.version import __version__

CARD_FILE = "README.md"

# Note [Model card]
# A card is written anew at each save, as long as this line is in it. A person who takes the line out, or wrote a card
# before the first save, keeps theirs. Nothing reads a card, and the sum of Note [Adapter file] does not cover it.
MARKER = "<!-- glora.save wrote this card and replaces it. To keep your own text, remove this line. -->"

_MOST_BYTES = 2**20  # of a card that is looked through: glora's are of a few kB
_MOST_ROWS = 50


def replaced_cards(folder: Path) -> list[Path]:
    """The card of a folder if a save replaces it: where there is none, or glora's own (Note [Model card])."""
    file = folder / CARD_FILE
    if not file.exists():
        return [] if file.is_symlink() else [file]
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        return [file] if MARKER.encode() in opened.read(_MOST_BYTES) else []


def card(adapter: AdapterSpec, base: str | None = None) -> str:
    """The card of an adapter: Markdown below the fields that a hub reads, which are YAML.

    Args:
        adapter: the adapter.
        base: the name of its base on a hub, `owner/name`; None where it is not known.

    Example:
        >>> import glora
        >>> layer = LayerSpec(glora.GLoRAConfig.lora(rank=2), out_features=8, in_features=4)
        >>> print(card(AdapterSpec({f"layers.{i}.q": layer for i in range(3)})).partition("## Layers")[2].strip())
        | modules | count | out x in | forms | rank | alpha |
        |---|---|---|---|---|---|
        | `layers.*.q` | 3 | 8 x 4 | B=lora | 2 | 2 |
    """
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    of = "the model that it was trained on" if base is None else f"`{base}`"
    front = [
        "library_name: glora",
        *([] if base is None else [f'base_model: "{base}"', "base_model_relation: adapter"]),
    ]
    heads = f", modules that are trained as a whole: {len(adapter.heads)}" if adapter.heads else ""
    lines = [
        *("---", *front, "tags:", "- glora", "- adapter", "---", MARKER, ""),
        "# GLoRA adapter",
        "",
        f"Small trained changes of the weights of {of}, which is not in this folder. Adapted layers: "
        f"{len(adapter.layers):,}{heads}. In all {numbers:,} numbers, {_readable(size)}.",
        "",
        "## How to load",
        "",
        "With glora installed, and its extra `files`:",
        "",
        "```python",
        "import glora",
        "",
        f"model = ...  # the base: {'the model that this adapter was trained on' if base is None else base}",
        'glora.load(model, "path/to/this/folder")  # attaches it; warns if the base is another one',
        "glora.merge(model)  # optional: plain layers again, with the adapter in their weights",
        "```",
        "",
        f"Written by glora {__version__} with torch {torch.__version__}.",
        "",
        "## Layers",
        "",
        *_table(["modules", "count", "out x in", "forms", "rank", "alpha"], _rows(adapter)),
    ]
    return "\n".join(lines) + "\n"


def _rows(adapter: AdapterSpec) -> Iterable[list[str]]:
    """A row for all modules that differ by numbers in their paths alone, `layers.0.q` and `layers.1.q`."""
    counts: dict[tuple[str, ...], int] = {}
    for path, layer in adapter.layers.items():
        key = _alike(path), *_columns(layer)
        counts[key] = counts.get(key, 0) + 1
    for path, names in adapter.heads.items():
        tensors = [adapter.tensors[key] for name in names if (key := join(path, name)) in adapter.tensors]
        key = _alike(path), "-", f"trained as a whole: {sum(t.numel() for t in tensors):,} numbers", "-", "-"
        counts[key] = counts.get(key, 0) + 1
    rows = [[path, f"{count:,}", *columns] for (path, *columns), count in counts.items()]
    yield from rows[:_MOST_ROWS]
    if len(rows) > _MOST_ROWS:
        yield [f"and {len(rows) - _MOST_ROWS:,} more", *[""] * 5]


def _columns(layer: LayerSpec) -> tuple[str, ...]:
    shape = " x ".join("?" if size is None else str(size) for size in (layer.out_features, layer.in_features))
    batch = f"{' x '.join(map(str, layer.batch))} of " if layer.batch else ""
    product = " (matrix product)" if layer.config.product == "matmul" and layer.config.A != "none" else ""
    alpha = layer.config.rank if layer.config.alpha is None else layer.config.alpha
    low_rank = ("-", "-") if layer.rank is None else (str(layer.rank), f"{alpha:g}")
    return batch + shape, layer.forms + product, *low_rank


def _alike(path: str) -> str:
    """A path in the font of code, with a star for each number, as a cell of a table."""
    return f"`{re.sub(r'(?<![^.])[0-9]+(?![^.])', '*', path)}`" if path else "the model itself"


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    text = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    return [f"|{line.replace(' ', '')}|" if line.startswith("---") else f"| {line} |" for line in text]


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
