"""Change the formula in twenty-odd ways, one at a time, and see that the tests notice every one.

    python -m tests.mutate          # all
    python -m tests.mutate 5 22     # these

Works on a copy in a temporary folder; the tree is left as it is. Exits with 1 if a change goes unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["tests/test_functional.py", "tests/test_layer.py"]

# file, what stands there (once), what a mistake would put in its place
MUTATIONS = [
    ("functional.py", "    return W0 * _whole(A)\n", "    return W0 + _whole(A)\n"),
    ("functional.py", "    return W0 * _whole(A)\n", "    return _whole(A)\n"),
    ("functional.py", "    return W0 * A  # a", "    return W0 * A.mT  # a"),
    ("functional.py", "    return W0 * A  # a", "    return W0 + A  # a"),
    ("functional.py", 'return _contract(W0, A, "o i, i j -> o j")', 'return _contract(W0, A, "o i, j i -> o j")'),
    ("functional.py", "A.shape == (W0.shape[1], W0.shape[1])", "A.shape == (W0.shape[0], W0.shape[0])"),
    ("functional.py", 'return _contract(_contract(W0, left, "o i, i r -> o r"), right', "return _contract(left, right"),
    ("functional.py", "_sum(scaled, None if B is None else _whole(B))", "scaled"),
    ("functional.py", "_sum(scaled, None if B is None else _whole(B))", "_sum(None if B is None else _whole(B), None)"),
    ("functional.py", "    if A is not None:\n        wide", "    if A is None:\n        wide"),
    ("functional.py", '_hadamard(wide, A) if product == "hadamard"', '_hadamard(wide, A) if product == "matmul"'),
    ("functional.py", "scaled = None if D is None else b0.to(", "scaled = None if D is None else -b0.to("),
    ("functional.py", "b0.to(working_dtype(b0)) * _whole(D)", "b0.to(working_dtype(b0)) + _whole(D)"),
    ("functional.py", "shifted = None if E is None else _whole(E)", "shifted = None"),
    ("functional.py", 'prompted = _contract(W0.to(working_dtype(W0)), prompt, "o i, i -> o")', "prompted = None"),
    ("functional.py", "return _sum(_sum(scaled, shifted), prompted)", "return _sum(scaled, shifted)"),
    ("functional.py", "return _sum(_sum(scaled, shifted), prompted)", "return _sum(shifted, prompted)"),
    ("functional.py", "    return first + second\n", "    return first - second\n"),
    ("functional.py", "    return first + second\n", "    return second\n"),
    ("functional.py", "second if first is None else first", "first"),
    ("functional.py", "(base.to(working_dtype(base)) + total)", "(base.to(working_dtype(base)) - total)"),
    ("functional.py", "(base.to(working_dtype(base)) + total).to(base.dtype)", "base + total.to(base.dtype)"),
    ("functional.py", "(base.to(working_dtype(base)) + total).to(base.dtype)", "base.to(working_dtype(base)) + total"),
    ("functional.py", "        total = _sum(total, update)\n", "        total = update\n"),
    ("functional.py", "    dtype = torch.float32\n", "    dtype = torch.bfloat16\n"),
    ("functional.py", "with torch.autocast(device, enabled=False):", "with torch.autocast(device, enabled=True):"),
    ("functional.py", "b0 = W0.new_zeros(W0.shape[0])", "b0 = W0.new_ones(W0.shape[0])"),
    (
        "functional.py",
        'return _contract(left, right, "o r, r i -> o i")',
        'return _contract(left, right, "o r, q i -> o i")',
    ),
    ("paths.py", "else strength * self.scaling", "else strength / self.scaling"),
    ("paths.py", "scale = kept * (scale / (1 - dropout))", "scale = kept * scale"),
    ("paths.py", ".bernoulli_(1 - dropout)", ".bernoulli_(dropout)"),
    ("parametrization.py", "bias_update(W0, b0, C, D, E)", "bias_update(W0, b0, None, D, E)"),
    ("layer.py", 'bias.frozen_weight = vars(value)["glora_frozen"]', "pass"),
]


def main() -> int:
    chosen = [int(argument) for argument in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    survived = 0
    for number in chosen:
        name, before, after = MUTATIONS[number - 1]
        noticed = run(name, before, after)
        survived += not noticed
        print(
            f"{number:2d} {'noticed ' if noticed else 'SURVIVED'} {name}: {before.strip()}  ->  {after.strip()}",
            flush=True,
        )
    print(f"{len(chosen) - survived} of {len(chosen)} changes noticed")
    return 1 if survived else 0


def run(name: str, before: str, after: str) -> bool:
    """Whether the tests fail with this change."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("glora", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "glora" / name
        text = file.read_text()
        if text.count(before) != 1:
            raise SystemExit(f"A mutation must fit one place; {before!r} stands {text.count(before)} times in {name}.")
        file.write_text(text.replace(before, after))
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
        if result.returncode not in (0, 1):
            raise SystemExit(f"The tests did not run:\n{result.stdout}\n{result.stderr}")
        return result.returncode == 1


if __name__ == "__main__":
    sys.exit(main())
