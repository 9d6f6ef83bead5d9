"""What the site is built with: mathematics as MathML, performance and results pages from what was measured."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads a hook as a lone file
import performance
import results

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the performance page and of the results page.

    Returns:
        The files.
    """
    for folder, made in (("performance", performance), ("results", results)):
        for name, content in made.pictures().items():
            files.append(File.generated(config, f"{folder}/{name}.svg", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables of results where a page asks for them by ``<!-- results: NAME -->``.

    Returns:
        The page.
    """
    tables = performance.tables() | results.tables()
    return re.sub(r"<!-- results: (\w+) -->", lambda match: tables[match[1]], markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn TeX into MathML, which browsers draw without a script.

    Returns:
        The page's HTML.
    """

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        formula = convert(html.unescape(match[2]).strip(), display=display)
        return f'<div class="formula">{formula}</div>' if display == "block" else formula

    return _FORMULA.sub(mathml, content)
