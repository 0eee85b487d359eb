"""Relative links of the Markdown files beside docs/, which MkDocs does not check: README, CONTRIBUTING and others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_dead_links", "headings"]

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^ *(`{3,})[^`].*?^ *\1 *$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def find_dead_links(root: Path) -> Iterator[str]:
    """Yield a sentence for each link to a file or heading that does not exist, in the Markdown files of a folder."""
    for page in sorted(root.glob("*.md")):
        for link in _LINK.findall(_CODE.sub("", page.read_text())):
            if ":" in link:
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists():
                yield f"{page.name}: {link}: there is no such file"
            elif anchor and target.suffix == ".md" and anchor not in headings(target.read_text()):
                yield f"{page.name}: {link}: there is no such heading"


def headings(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them.

    Example: "### `input.require`" becomes "inputrequire".
    """
    titles = _HEADING.findall(re.sub(r"^ *(`{3,}).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL))
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}
