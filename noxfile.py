"""Everything that can be run in an environment of its own: `nox --list`.

`nox` alone checks, tests under each Python that is there, and builds the documentation and the package.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["checks", "tests", "docs", "package"]

CONSTRAINTS = Path("constraints.txt")
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OLDEST = "2.13.0"  # pyproject.toml's `torch>=`


def install(session: nox.Session, *arguments: str) -> None:
    """Install under the constraints; under Python 3.10, where newer packages end, under torch's alone."""
    constraints = CONSTRAINTS
    if session.python == "3.10":
        constraints = Path(session.create_tmp()) / "torch.txt"
        constraints.write_text("".join(re.findall(r"^torch==.*\n", CONSTRAINTS.read_text(), re.MULTILINE)))
    session.install("-c", str(constraints), *arguments)


@nox.session
def checks(session: nox.Session) -> None:
    """ruff, pyright, lint-imports: what .pre-commit-config.yaml has."""
    install(session, "-e", ".[dev,interop]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")
    session.run("lint-imports")


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [nox.param("newest", id="newest"), nox.param("oldest", id="oldest")])
def tests(session: nox.Session, torch: str) -> None:
    """The tests that need no other processes: `nox -s "tests-3.12(newest)" -- -n 2 tests/layer`."""
    if torch == "newest":
        install(session, "-e", ".[dev,interop]")
    else:  # without transformers and what else asks for a newer one; their tests are skipped
        session.install(f"torch=={OLDEST}", "-e", ".[cli,search]")
        session.install("matplotlib>=3.9", "pyyaml", "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
    session.run("python", "-m", "pytest", *(session.posargs or ["-n", "2"]))


@nox.session
def integration(session: nox.Session) -> None:
    """Two processes, exporters, trainers, diffusers: the tests marked `integration`."""
    install(session, "-e", ".[dev,interop,integration]")
    session.run("python", "-m", "pytest", "-m", "integration", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into site/."""
    install(session, "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def package(session: nox.Session) -> None:
    """The wheel and the sdist into dist/, checked, and tests against the installed wheel."""
    install(session, "build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    (wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    install(session, f"{wheel}[files]", "pytest", "hypothesis")
    # From a folder that has the tests and no glora.
    alone = Path(session.create_tmp()).resolve() / "alone"
    shutil.rmtree(alone, ignore_errors=True)
    for name in ("tests", "pyproject.toml"):
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy2
        alone.mkdir(parents=True, exist_ok=True)
        copy(name, alone / name)
    session.chdir(alone)
    where = "import glora; print(glora.__file__); assert 'site-packages' in glora.__file__"
    session.run("python", "-c", where)
    session.run("python", "-m", "pytest", "tests/test_functional.py", "tests/test_config.py", "tests/test_package.py")


if __name__ == "__main__":
    sys.exit("Run `nox`, or `nox --list`.")
