"""Code blocks of README, CONTRIBUTING and docs/: all can be read; those of the first pages are run.

`tests/slow/test_docs_pages.py` runs those of the other pages.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.doc_blocks import FIRST_PAGES, PAGES, ROOT, check_block, read_blocks, run_page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_page_can_be_read(page: Path, tmp_path: Path) -> None:
    for block in read_blocks(page):
        check_block(block, tmp_path)


@pytest.mark.parametrize("page", FIRST_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_first_page_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)
