"""The documentation: its API pages have the public names and no others, its first page runs, and it builds."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import glora

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# What is public of modules that have no `__all__`.
OTHERS = {
    "glora.functional": ["weight", "bias", "linear"],
    "glora.integrations.trainer": ["AdapterCheckpoints"],
    "glora.integrations.lightning": ["AdapterCheckpoints", "load"],
    "glora.integrations.trl": ["BaseReference", "reference"],
}
MODULES = {"functional", "integrations", "interop", "search"}


def public() -> set[str]:
    """Every public name but those of modules."""
    names = {f"glora.{name}" for name in set(glora.__all__) - MODULES}
    for module in ("glora.interop", "glora.search"):
        names |= {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    return names | {f"{module}.{name}" for module, found in OTHERS.items() for name in found}


def nav(entries: Any) -> list[str]:
    """The pages of a navigation."""
    if isinstance(entries, str):
        return [entries]
    inside = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in inside for page in nav(entry)]


def test_the_api_pages_have_the_public_names_and_no_others() -> None:
    listed = [name for page in (DOCS / "api").iterdir() for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    assert sorted(listed) == sorted(public())


def test_the_modules_are_those_of_glora() -> None:
    assert set(glora.__all__) >= MODULES
    assert all(type(getattr(glora, name)) is type(glora) for name in MODULES)
    assert not any(type(getattr(glora, name)) is type(glora) for name in set(glora.__all__) - MODULES)
    assert {f"glora.integrations.{name}" for name in glora.integrations.__all__} == {
        name for name in OTHERS if "integrations" in name
    }


def test_every_page_is_in_the_navigation_once() -> None:
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(pages)


def test_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert code
    exec(code[1], {})
    assert (tmp_path / "adapter" / "README.md").is_file()


@pytest.mark.long
@pytest.mark.skipif(not all(map(find_spec, ("material", "mkdocstrings"))), reason="needs the extra docs")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run([*command, "-d", str(tmp_path)], env=quiet, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    text = (tmp_path / "tutorials" / "vision" / "index.html").read_text()
    assert "{{" not in text
    assert "patch_embeddings" in text
    assert (tmp_path / "results" / "layer-training.png").is_file()
