"""`python -m glora`: adapter files without a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from glora.files.adapter import read, write
from glora.files.checkpoint import merge_checkpoint, shapes_of
from glora.files.container import CONFIG_FILE, adapter_file, import_optional, parse_json
from glora.interop.lycoris import read_lycoris, write_lycoris
from glora.interop.peft import read_peft, write_peft
from glora.spec import AdapterSpec, join
from glora.text import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 after an error that was printed, 2 for a call that is not understood."""
    parser = argparse.ArgumentParser(prog="python -m glora", description="Adapter files, without a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    merge = commands.add_parser("merge", help="bake an adapter into a checkpoint, tensor by tensor")
    merge.add_argument("base", type=Path, help="a .safetensors file, or a sharded one's .safetensors.index.json")
    merge.add_argument("adapter", type=Path, help="glora's folder, PEFT's folder or LyCORIS's file")
    merge.add_argument("out", type=Path, help="a .safetensors file, or for a sharded base an .index.json")
    merge.set_defaults(run=_merge)

    inspect = commands.add_parser("inspect", help="print an adapter's layers, forms, ranks, parameters, bytes, norms")
    inspect.add_argument("adapter", type=Path, help="as for merge")
    inspect.add_argument("--base", type=Path, help="the base checkpoint; LyCORIS's names are read by its keys")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write an adapter as another library has it")
    convert.add_argument("adapter", type=Path, metavar="in", help="as for merge")
    convert.add_argument("out", type=Path, help="a folder; for LyCORIS a .safetensors file")
    convert.add_argument("--to", required=True, choices=["peft", "glora", "lycoris"])
    convert.add_argument("--base", type=Path, help="the base checkpoint; LyCORIS's names are read by its keys")
    convert.set_defaults(run=_convert)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"glora: {error}", file=sys.stderr)
        return 1
    return 0


def read_any(path: Path, base: Path | None) -> AdapterSpec:
    """An adapter of glora, PEFT or LyCORIS, told apart by what is there."""
    if path.is_dir():
        config_file = path / CONFIG_FILE
        raw = parse_json(config_file.read_bytes(), config_file) if config_file.exists() else None
        return read_peft(path) if isinstance(raw, dict) and "peft_type" in raw else read(adapter_file(path))
    if path.suffix == ".safetensors":
        with import_optional("safetensors").safe_open(str(path), framework="pt") as opened:
            if "glora" in (opened.metadata() or {}):
                return read(path)
    if base is None:
        raise ValueError(
            f"LyCORIS has underscores for the dots in its layers' names, so that {path} can only be read beside "
            f"the base checkpoint: pass --base."
        )
    shapes = {key.removesuffix(".weight"): shape for key, shape in shapes_of(base).items() if key.endswith(".weight")}
    return read_lycoris(path, shapes)


def _merge(options: argparse.Namespace) -> None:
    adapter = read_any(options.adapter, options.base)
    with import_optional("tqdm").tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=options.out.name) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        merge_checkpoint(options.base, adapter, options.adapter, options.out, progress)


def _inspect(options: argparse.Namespace) -> None:
    adapter = read_any(options.adapter, options.base)
    rows: list[list[str]] = []
    for path, layer in adapter.layers.items():
        forms = " ".join(f"{name}={form}" for name, form in layer.config.forms.items() if form != "none")
        if layer.config.product == "matmul" and layer.config.A != "none":
            forms += " (matmul)"
        rank = str(layer.config.rank) if "lora" in layer.config.forms.values() else "-"
        shape = "x".join("?" if size is None else str(size) for size in (layer.out_features, layer.in_features))
        rows.append([path, shape, forms, rank, *_numbers(adapter, [join(path, key) for key in layer.tensors()])])
    for path, names in adapter.heads.items():
        rows.append([path, "-", "head", "-", *_numbers(adapter, [join(path, name) for name in names])])
    parameters, size, norm = _numbers(adapter, list(adapter.tensors))
    title = f"{len(adapter.layers)} layers, {parameters} parameters, {size} bytes, norm {norm}"
    print(table(title, ["module", "out x in", "forms", "rank", "parameters", "bytes", "norm"], rows))


def _numbers(adapter: AdapterSpec, keys: list[str]) -> list[str]:
    """Parameters, bytes and Frobenius norm of some tensors."""
    tensors = [adapter.tensors[key] for key in keys if key in adapter.tensors]
    norm = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    return [f"{sum(t.numel() for t in tensors):,}", f"{sum(t.nbytes for t in tensors):,}", f"{norm:.4g}"]


def _convert(options: argparse.Namespace) -> None:
    adapter = read_any(options.adapter, options.base)
    {"glora": write, "peft": write_peft, "lycoris": write_lycoris}[options.to](options.out, adapter)


if __name__ == "__main__":
    sys.exit(main())
