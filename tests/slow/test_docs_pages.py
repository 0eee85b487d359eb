"""Code blocks of docs/, run in the order of each page, beside those that `tests/integration` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.doc_blocks import FIRST_PAGES, PAGES, ROOT, run_page

OTHER_PAGES = [page for page in PAGES if page not in FIRST_PAGES]


@pytest.mark.parametrize("page", OTHER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)
