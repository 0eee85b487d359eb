"""Code blocks of CONTRIBUTING and docs/, run in the order of each page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.doc_blocks import PAGES, ROOT, run_page

# `tests/integration/test_docs_blocks.py` runs these.
FIRST_PAGES = {ROOT / "README.md", ROOT / "docs" / "getting-started.md"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in FIRST_PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)
