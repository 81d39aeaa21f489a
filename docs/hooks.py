"""mkdocs: a tutorial's page is its script, pages show pictures and tables of the results, formulas are MathML."""

from __future__ import annotations

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = [ROOT / "benchmarks" / "results", ROOT / "studies" / "results"]


def on_files(files: Any, config: Any) -> Any:
    """The results that README and pages link to are files of the site too."""
    for file in sorted(file for folder in RESULTS for file in folder.iterdir()):
        files.append(File.generated(config, f"results/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`{{ script examples/NAME.py }}` is the script as a page; `{{ file NAME }}` is the text of a file."""
    markdown = re.sub(r"\{\{ script (\S+) \}\}", lambda found: page_of(ROOT / found[1]), markdown)
    return re.sub(r"\{\{ file (\S+) \}\}", lambda found: (ROOT / found[1]).read_text(), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers set by themselves: no script, and nothing from another host."""

    def formula(found: re.Match[str]) -> str:
        return convert(unescape(found[1]), display="block" if found[0].startswith("<div") else "inline")

    return re.sub(
        r'<(?:div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</(?:div|span)>', formula, html, flags=re.DOTALL
    )


def page_of(script: Path) -> str:
    """A script in jupytext's percent format as Markdown: its docstring, its texts, its code."""
    source = script.read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    title, _, rest = docstring.partition("\n\n")
    parts = [title, rest]
    for cell in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        if "[markdown]" in kind:
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines()))
        elif text.strip():
            parts.append(f"```python\n{text.strip()}\n```")
    name = script.relative_to(ROOT)
    parts.append(f"The script is `{name}`; `jupytext --to notebook {name}` makes a notebook of it.")
    return "\n\n".join(parts)
