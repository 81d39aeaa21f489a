"""What a release claims: one version everywhere, and the same checks for people, CI and the matrix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import glora

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_one_version() -> None:
    assert f'\nversion = "{glora.__version__}"\n' in PROJECT
    assert read("CITATION.cff")["version"] == glora.__version__
    released = re.findall(r"^## \[(\d.*?)\]", CHANGELOG, re.MULTILINE)
    assert not released or released[0] == glora.__version__


def test_the_changelog_is_in_the_form_of_keep_a_changelog() -> None:
    assert CHANGELOG.startswith("# Changelog\n")
    headings = re.findall(r"^#+ .*$", CHANGELOG, re.MULTILINE)[1:]
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    section: list[str] = []
    for heading in headings:
        if heading.startswith("## "):
            assert re.fullmatch(r"## \[(Unreleased|\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d)\]?", heading)
            section = []
        else:
            kind = heading.removeprefix("### ")
            assert kind in kinds
            assert kind not in section
            section.append(kind)


def test_people_and_ci_have_the_same_checks() -> None:
    (local,) = read(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith(("ruff", "pyright", "lint-imports"))] == entries
    session = (ROOT / "noxfile.py").read_text().partition("def checks")[2].partition("\n\n\n")[0]
    runs = [re.findall(r'"(.*?)"', line) for line in re.findall(r"session\.run\((.*)\)", session)]
    assert [" ".join(run) for run in runs] == entries


def test_the_matrix_is_what_is_claimed() -> None:
    nox = (ROOT / "noxfile.py").read_text()
    (oldest,) = re.findall(r'OLDEST = "(.*)"', nox)
    assert f'"torch>={oldest}"' in PROJECT
    pythons = re.findall(r"3\.\d+", nox.partition("PYTHONS = ")[2].partition("\n")[0])
    assert f'requires-python = ">={pythons[0]}"' in PROJECT
    assert read(".github/workflows/ci.yml")["jobs"]["matrix"]["strategy"]["matrix"]["python"] == pythons
    classified = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert set(classified) <= set(pythons)


@pytest.mark.parametrize("name", ["bug.yml", "wish.yml", "config.yml"])
def test_the_templates_can_be_read(name: str) -> None:
    assert read(f".github/ISSUE_TEMPLATE/{name}")
