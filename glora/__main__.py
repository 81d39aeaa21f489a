"""The commands `glora` and `python -m glora`: adapter files without a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from glora.files.adapter import read, write
from glora.files.checkpoint import merge_checkpoint, shapes_of
from glora.files.container import PEFT_CONFIG_FILE, adapter_file, import_optional, read_header
from glora.interop.lycoris import read_lycoris, write_lycoris
from glora.interop.peft import read_peft, write_peft
from glora.spec import AdapterSpec, join
from glora.text import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 after an error that was printed, 2 after wrong arguments."""
    parser = argparse.ArgumentParser(prog="glora", description="Adapter files, without a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lycoris = argparse.ArgumentParser(add_help=False)
    lycoris.add_argument("--rs-lora", action="store_true", help="LyCORIS's files have alpha / sqrt(rank), as rs_lora")
    reads = argparse.ArgumentParser(add_help=False, parents=[lycoris])
    reads.add_argument("adapter", type=Path, help="glora's folder, PEFT's folder or LyCORIS's file")
    reads.add_argument("--base", type=Path, help="the base checkpoint; LyCORIS's names are read by its keys")

    merge = commands.add_parser("merge", help="bake an adapter into a checkpoint, tensor by tensor", parents=[lycoris])
    merge.add_argument("base", type=Path, help="a .safetensors file, or a sharded one's .safetensors.index.json")
    merge.add_argument("adapter", type=Path, help="glora's folder, PEFT's folder or LyCORIS's file")
    merge.add_argument("out", type=Path, help="a .safetensors file, or for a sharded base an .index.json")
    merge.add_argument("--strict", action="store_true", help="an error for another base than the adapter's, no warning")
    merge.set_defaults(run=_merge)

    inspect = "print an adapter's layers, forms, ranks, parameters, bytes and norms"
    commands.add_parser("inspect", help=inspect, parents=[reads]).set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write an adapter as another library has it", parents=[reads])
    convert.add_argument("out", type=Path, help="a folder; for LyCORIS a .safetensors file")
    convert.add_argument("--to", required=True, choices=["peft", "glora", "lycoris"])
    convert.set_defaults(run=_convert)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"glora: {error}", file=sys.stderr)
        return 1
    return 0


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
            return read_peft(path) if (path / PEFT_CONFIG_FILE).exists() else read(file)
    if options.base is None:
        raise ValueError(
            f"A file of LyCORIS has underscores for the dots in its layers' paths, and the base checkpoint says which "
            f"are dots; found no base for {path}. Pass --base."
        )
    shapes = {key.removesuffix(".weight"): s for key, s in shapes_of(options.base).items() if key.endswith(".weight")}
    return read_lycoris(path, shapes, rs_lora=options.rs_lora)


def _merge(options: argparse.Namespace) -> None:
    adapter = _read(options)
    tqdm = import_optional("tqdm", "cli").tqdm
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=options.out.name) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        merge_checkpoint(options.base, adapter, options.adapter, options.out, progress, strict=options.strict)


def _inspect(options: argparse.Namespace) -> None:
    adapter = _read(options)
    rows: list[Sequence[str | int | None]] = []
    for path, layer in adapter.layers.items():
        product = " (matmul)" if layer.config.product == "matmul" and layer.config.A != "none" else ""
        shape = "x".join("?" if size is None else str(size) for size in (layer.out_features, layer.in_features))
        keys = [join(path, key) for key in layer.tensors()]
        rows.append([path, shape, layer.forms + product, layer.rank, *_numbers(adapter, keys)])
    for path, names in adapter.heads.items():
        rows.append([path, None, "head", None, *_numbers(adapter, [join(path, name) for name in names])])
    parameters, size, norm = _numbers(adapter, adapter.tensors)
    title = f"{len(adapter.layers)} layers, {parameters:,} parameters, {size:,} bytes, norm {norm}"
    print(table(title, ["module", "out x in", "forms", "rank", "parameters", "bytes", "norm"], rows))


def _numbers(adapter: AdapterSpec, keys: Iterable[str]) -> tuple[int, int, str]:
    """Parameters, bytes and Frobenius norm of some tensors."""
    tensors = [adapter.tensors[key] for key in keys if key in adapter.tensors]
    norm = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    return sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors), f"{norm:.4g}"


def _convert(options: argparse.Namespace) -> None:
    adapter = _read(options)
    if options.to == "lycoris":
        write_lycoris(options.out, adapter, rs_lora=options.rs_lora)
    else:
        {"glora": write, "peft": write_peft}[options.to](options.out, adapter)


if __name__ == "__main__":
    sys.exit(main())
