"""The commands `glora` and `python -m glora`: adapter files without a model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from glora.arithmetic.combine import combine_files, error_table
from glora.arithmetic.extract import extract_checkpoint, fit_table
from glora.config import GLoRAConfig
from glora.files.adapter import read, write
from glora.files.checkpoint import checkpoint_file, frozen_tensors, merge_checkpoint
from glora.files.container import (
    ADAPTER_FILE,
    CONFIG_FILE,
    PEFT_CONFIG_FILE,
    adapter_file,
    import_optional,
    read_header,
)
from glora.files.norms import Norms, path_norms, update_norms
from glora.interop.base import Base
from glora.interop.checkpoint import base_at, fitted
from glora.interop.lycoris import read_lycoris, write_lycoris
from glora.interop.lycoris.held import held_by
from glora.interop.peft import read_peft, write_peft
from glora.spec import AdapterSpec, join
from glora.text import format_names, table
from glora.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 after an error that was printed, 2 after wrong arguments, 130 cut off."""
    parser = argparse.ArgumentParser(prog="glora", description="Adapter files, without a model.")
    parser.add_argument("--version", action="version", version=f"glora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lycoris = argparse.ArgumentParser(add_help=False)
    lycoris.add_argument("--rs-lora", action="store_true", help="LyCORIS's files have alpha / sqrt(rank), as rs_lora")
    reads = argparse.ArgumentParser(add_help=False, parents=[lycoris])
    reads.add_argument("adapter", type=Path, help="glora's folder, PEFT's folder or LyCORIS's file")
    reads.add_argument(
        "--base",
        type=Path,
        help="the base: a checkpoint's file, or a model's folder. LyCORIS's names are read by its keys, what must be "
        "computed beside W0 (DoRA, VeRA, LoHa, experts) beside its tensors, and inspect compares the update with it",
    )

    merge = commands.add_parser("merge", help="bake an adapter into a checkpoint, tensor by tensor", parents=[lycoris])
    merge.add_argument("base", type=Path, help="a .safetensors file, the .index.json of several, or a folder")
    merge.add_argument("adapter", type=Path, help="glora's folder, PEFT's folder or LyCORIS's file")
    merge.add_argument("out", type=Path, help="a .safetensors file, or for a sharded base an .index.json")
    merge.add_argument("--strict", action="store_true", help="an error for another base than the adapter's, no warning")
    merge.set_defaults(run=_merge)

    inspect = "print an adapter's layers, forms, ranks, parameters, bytes and norms; of its update, with --base"
    commands.add_parser("inspect", help=inspect, parents=[reads]).set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write an adapter as another library has it", parents=[reads])
    convert.add_argument("out", type=Path, help="a folder; for kohya and LyCORIS a .safetensors file")
    formats = "peft: the method that the forms are; peft-lora: LoRA alone, which servers read"
    convert.add_argument("--to", required=True, choices=_FORMATS, help=formats)
    nearest = "with peft-lora: write what is no LoRA as the nearest of this rank, and print the relative errors"
    convert.add_argument("--rank", type=int, help=nearest)
    convert.add_argument("--tolerance", type=float, help="with peft-lora: the largest relative error of a layer")
    prefix = "what stands before each name: lora_unet (kohya's, if nothing is given), lora_te, lycoris (LyCORIS's)"
    convert.add_argument("--prefix", help=prefix)
    convert.set_defaults(run=_convert)

    combine = commands.add_parser("combine", help="write a weighted sum of adapters as one adapter", parents=[lycoris])
    combine.add_argument("adapters", type=Path, nargs="+", help="two adapters or more, and last the folder to write")
    combine.add_argument("--weights", required=True, help="a number for each, as 0.7,0.3")
    combine.add_argument("--rank", type=int, help="cut each path to this rank, and print the relative errors")
    combine.add_argument("--base", type=Path, help="the base checkpoint, for files of LyCORIS")
    combine.set_defaults(run=_combine)

    extract = commands.add_parser("extract", help="write the LoRA that comes closest to a fine-tuned checkpoint")
    extract.add_argument("base", type=Path, help="a .safetensors file, the .index.json of several, or a folder")
    extract.add_argument("tuned", type=Path, help="the same after fine-tuning")
    extract.add_argument("out", type=Path, help="the folder to write")
    extract.add_argument("--rank", type=int, required=True)
    extract.add_argument(
        "--targets",
        default=_LINEAR,
        help="a regex of the paths of nn.Linear layers; all but embeddings, by their names",
    )
    extract.set_defaults(run=_extract)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"glora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("glora: interrupted; no file was changed", file=sys.stderr)
        return 130
    return 0


_FORMATS = ("peft", "peft-lora", "kohya", "lycoris", "glora")
_TENSOR_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # the latter four: LyCORIS's, by torch.save


def _read(options: argparse.Namespace) -> AdapterSpec:
    """An adapter of glora, PEFT or LyCORIS, recognised by its files."""
    path: Path = options.adapter
    if not path.exists():
        raise FileNotFoundError(f"An adapter is a folder or a file; there is none at {str(path)!r}.")
    if path.is_dir() or path.suffix == ".safetensors":
        file = adapter_file(path)
        if "glora" in read_header(file).metadata:
            return read(file)
        if path.is_dir():
            if not (path / PEFT_CONFIG_FILE).exists():
                return read(file)
            return read_peft(path, Base() if options.base is None else base_at(options.base))
        if not any(key.endswith(".alpha") or "lora" in key or "lycoris" in key for key in read_header(path).tensors):
            raise ValueError(
                f"An adapter has low-rank factors or vectors, and no whole weights; {path} is none that glora, PEFT or "
                f"LyCORIS writes, and looks like a model's checkpoint. Pass the adapter; --base takes a checkpoint."
            )
    elif path.suffix not in _TENSOR_FILES:
        where = f"; its folder {str(path.parent)!r} may be one" if path.name in (CONFIG_FILE, PEFT_CONFIG_FILE) else ""
        raise ValueError(
            f"An adapter is a folder, or a file of tensors ({', '.join(_TENSOR_FILES)}); found {str(path)!r}{where}."
        )
    if options.base is None:
        raise ValueError(
            f"A file of LyCORIS has underscores for the dots in its layers' paths, and the base checkpoint says which "
            f"are dots; found no base for {path}. Pass --base."
        )
    held = held_by(base_at(options.base, convolutions=True))
    (adapter,) = read_lycoris(path, {None: held}, rs_lora=options.rs_lora).values()
    return adapter


def _merge(options: argparse.Namespace) -> None:
    base, out = options.base, options.out
    is_adapter = (base / ADAPTER_FILE).exists()
    if not is_adapter:
        file = checkpoint_file(base)
        is_adapter = file.suffix == ".safetensors" and file.is_file() and "glora" in read_header(file).metadata
    if is_adapter:
        raise ValueError(f"`merge` takes BASE ADAPTER OUT, in this order; found an adapter, {base}, as the base.")
    if not out.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"A merged checkpoint is a .safetensors file, or the .index.json of several; found {out}. `merge` takes "
            f"BASE ADAPTER OUT, in this order."
        )
    adapter = _read(options)
    tqdm = import_optional("tqdm", "cli").tqdm
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=options.out.name) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        merge_checkpoint(options.base, adapter, options.adapter, options.out, progress, strict=options.strict)


def _inspect(options: argparse.Namespace) -> None:
    adapter = _read(options)
    frozen = None if options.base is None else frozen_tensors(options.base, adapter, options.adapter)
    rows: list[Sequence[str | int | None]] = []
    changes: list[Norms] = []
    for path, layer in adapter.layers.items():
        product = " (matmul)" if layer.config.product == "matmul" and layer.config.A != "none" else ""
        shape = "x".join("?" if size is None else str(size) for size in (layer.out_features, layer.in_features))
        keys = [join(path, key) for key in layer.tensors()]
        norms = " ".join(f"{name}={norm:.4g}" for name, norm in path_norms(adapter, path, layer).items())
        row = [path, shape, layer.forms + product, layer.rank, *_sizes(adapter, keys), norms]
        if frozen is not None:
            changes.append(change := update_norms(adapter, path, layer, *next(frozen)))
            row += [f"{change.weight:.4g}", _share(change.weight, change.of_weight), f"{change.bias:.4g}"]
        rows.append(row)
    header = ["module", "out x in", "forms", "rank", "parameters", "bytes", "norms of paths"]
    header += [] if frozen is None else ["of W' - W0", "of W0", "of b' - b0"]
    for path, names in adapter.heads.items():
        row = [path, None, "head", None, *_sizes(adapter, [join(path, name) for name in names])]
        rows.append([*row, *[None] * (len(header) - len(row))])
    parameters, size = _sizes(adapter, adapter.tensors)
    title = f"{len(adapter.layers)} layers, {parameters:,} parameters, {size:,} bytes"
    if changes:
        weight, of_weight = math.hypot(*[c.weight for c in changes]), math.hypot(*[c.of_weight for c in changes])
        title += f", W' - W0 of norm {weight:.4g}, {_share(weight, of_weight)} of W0's"
    print(table(title, header, rows))


def _sizes(adapter: AdapterSpec, keys: Iterable[str]) -> tuple[int, int]:
    """Parameters and bytes of some tensors."""
    tensors = {key: adapter.tensors[key] for key in keys if key in adapter.tensors}
    parameters = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith("A.balance"))
    return parameters, sum(tensor.nbytes for tensor in tensors.values())


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _convert(options: argparse.Namespace) -> None:
    to, out, one_file = options.to, options.out, options.to in ("kohya", "lycoris")
    for name, value, formats in (
        ("rank", options.rank, ["peft-lora"]),
        ("tolerance", options.tolerance, ["peft-lora"]),
        ("prefix", options.prefix, ["kohya", "lycoris"]),
    ):
        if value is not None and to not in formats:
            raise ValueError(f"--{name} goes with --to {' or '.join(formats)}; found --to {to}. Leave it out.")
    adapter, base = _read(options), Base()
    if options.base is not None and to != "glora":
        base = fitted(base_at(options.base, convolutions=one_file), adapter, options.adapter)
    others = [f"{path!r} ({layer.forms})" for path, layer in adapter.layers.items() if layer.config.paths != ("B",)]
    if to == "kohya" and others:
        raise ValueError(
            f"kohya's scripts read LoRA and LoCon, a low-rank B alone; found {format_names(others)}. --to lycoris "
            f"takes GLoRA, IA3 and dora_scale too, and --to peft-lora --rank 16 writes the nearest LoRA."
        )
    if one_file:
        prefix = options.prefix or {"kohya": "lora_unet"}.get(to, to)
        write_lycoris(out, {prefix: adapter}, {prefix: base}, rs_lora=options.rs_lora)
    elif to == "glora":
        write(out, adapter)
    else:
        write_peft(out, adapter, base, "auto" if to == "peft" else "lora", options.rank, options.tolerance)
    layers, heads = len(adapter.layers), f" and {len(adapter.heads)} heads" if adapter.heads else ""
    print(f"Wrote {layers} layers{heads} to {options.out}, as {options.to} has them.")


def _combine(options: argparse.Namespace) -> None:
    *sources, out = options.adapters
    try:
        weights = [float(weight) for weight in options.weights.split(",")]
    except ValueError:
        weights = []
    if len(sources) < 2 or len(weights) != len(sources) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"`combine` takes A B OUT --weights 0.7,0.3: two adapters or more, a folder, and a finite number for each "
            f"adapter; found {len(sources)} adapters and the weights {options.weights!r}."
        )
    adapters = [_read(argparse.Namespace(**{**vars(options), "adapter": source})) for source in sources]
    spec, errors = combine_files(list(zip(weights, adapters, strict=True)), options.rank)
    write(out, spec)
    if options.rank is not None:
        print(error_table(f"low-rank paths, cut to rank {options.rank}", errors))
    print(f"Wrote {len(spec.layers)} layers to {out}.")


_LINEAR = r"(?!.*(embed|wte|wpe|shared)).*"


def _extract(options: argparse.Namespace) -> None:
    config = GLoRAConfig.lora(rank=options.rank)
    spec, fits, others = extract_checkpoint(options.base, options.tuned, config, options.targets)
    write(options.out, spec)
    print(fit_table(f"{len(spec.layers)} layers", fits))
    if others:
        print(f"{len(others)} other tensors differ, which the adapter does not hold: {format_names(others)}")


if __name__ == "__main__":
    sys.exit(main())
