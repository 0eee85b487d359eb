"""Markdown of generated pages: tables, and the notice that a page is generated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["UndocumentedError", "join_lines", "notice", "table"]


class UndocumentedError(Exception):
    """Part of the public face that has no sentence of documentation."""


def notice(source: str) -> str:
    """Return the comment that says how a page is made.

    Args:
        source: Origin of the page's text, such as `the settings classes`.
    """
    return f"<!-- Written by `make docs-pages` from {source}; do not edit. -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cells may hold Markdown of one line."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def join_lines(text: str) -> str:
    """Join the lines of each paragraph, and keep lists and paragraphs apart."""
    return re.sub(r"(?<!\n)\n(?![\n*-])[ \t]*", " ", text.strip())


def _escape(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
