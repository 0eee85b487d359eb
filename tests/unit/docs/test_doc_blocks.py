"""Tests of code blocks: pages that must fail do fail, with page, line, problem and output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.doc_blocks import run_page


def run(text: str, folder: Path) -> None:
    """Run a page with this text; `'''` stands for the fence."""
    page = folder / "page.md"
    page.write_text(text.replace("'''", "```"))
    run_page(page, folder)


def test_blocks_share_a_folder_and_run_in_order(tmp_path: Path) -> None:
    run(
        "# Page\n\n<!-- images: photos 3 -->\n'''bash\nls photos | wc -l > count\n'''\n\n"
        "'''python title=\"net.py\"\nCOUNT = 3\n'''\n\n"
        "'''python\nimport net\n\nassert int(open('count').read()) == net.COUNT\n'''\n\n"
        "1. In a list:\n\n    '''sql\n    SELECT * FROM read_csv('count')\n    '''\n\n'''text\nanything (\n'''\n",
        tmp_path,
    )


def test_fragment_is_laid_over_a_smallest_job(tmp_path: Path) -> None:
    run("'''yaml\nparams: {dt: {type: date}}\noutput: {uri: 'out/${dt}'}\n'''\n", tmp_path)


def test_block_that_is_not_run_needs_nothing(tmp_path: Path) -> None:
    run("<!-- not run: needs\na cluster -->\n\n'''hcl\nresource {\n'''\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Page\n\n'''bash\ntrue\necho no; false\n'''", r"page\.md:3: bash block: exit code 1\n *no\n *line 2: false"),
        ("'''bash\nif\n'''", r"page\.md:1: bash block: bash cannot read it"),
        ("'''bash\nfalse | true\n'''", r"exit code 1"),
        ("'''python\nraise OSError('gone')\n'''", r"python block: exit code 1\n(?s:.*)OSError: gone"),
        ("'''python title='net.py'\ndef\n'''", r"line 1 is no Python"),
        ("'''sql\nSELECT missing\n'''", r"sql block: DuckDB refuses it"),
        ("'''sql\nSELEC 1\n'''", r"sql block: DuckDB cannot read it"),
        ("'''yaml\nruntime: {pol: local}\n'''", r"no valid job\n(?s:.*)runtime\.pol"),
        ("'''yaml title='a.yaml'\ninput: {}\nmodel: {}\noutput: {}\n'''", r"no valid job\n(?s:.*)a?\.yaml:1"),
        ("'''yaml\n- a list\n'''", r"no fragment of a job file"),
        ("'''yaml\na: [\n'''", r"it is no YAML"),
        ("'''console\n$ ls\n'''", r"console block: its language is none of bash"),
        ("'''\nls\n'''", r"code block: its language is none of bash"),
        ("<!-- not run -->\n'''bash\nls\n'''", r"say why it is not run"),
        ("<!-- not run: no -->\nText.\n'''bash\nls\n'''", r"text stands between the comment `not run` and its block"),
        ("<!-- images: photos -->\n'''bash\nls\n'''", r"write <!-- images: FOLDER NUMBER -->"),
        ("'''bash\nls\n'''\n<!-- not run: no -->\n", r"has no block after it"),
    ],
)
def test_fault_of_a_page_is_reported(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=message):
        run(text, tmp_path)
