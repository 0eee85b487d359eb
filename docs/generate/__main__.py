"""Write the generated pages (`make docs-pages`), or check them with `--check`: none is stale, and no link is dead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from docs.generate import architecture, command_line, exit_codes, job_file, output_columns, python_api
from docs.generate.links import find_dead_links
from docs.generate.markdown import UndocumentedError

__all__ = ["PAGES", "main"]

DOCS = Path(__file__).parents[1]
# Page -> function that returns its text.
PAGES: Mapping[str, Callable[[], str]] = {
    "reference/job-file.md": job_file.page,
    "reference/command-line.md": command_line.page,
    "reference/python-api.md": python_api.page,
    "reference/output-columns.md": output_columns.page,
    "reference/exit-codes.md": exit_codes.page,
    "internals/architecture.md": architecture.page,
}


def main(folder: Path = DOCS, check: bool = False) -> int:
    """Write or check all generated pages.

    Args:
        folder: Folder of the documentation.
        check: True writes nothing; it prints the pages that are stale, and dead links of the files beside the folder.

    Returns:
        Exit code: 1 if a page is stale, something in it is not documented, or a link is dead.
    """
    problems = list(find_dead_links(folder.parent)) if check else []
    for name, make_page in PAGES.items():
        path = folder / name
        try:
            text = make_page()
        except UndocumentedError as error:
            sys.stderr.write(f"docs/{name}: {error}\n")
            return 1
        if path.exists() and path.read_text() == text:
            continue
        if check:
            problems.append(f"docs/{name} is stale; write it again with `make docs-pages`")
        else:
            path.write_text(text)
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
