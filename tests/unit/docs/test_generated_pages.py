"""Generated pages: what is not documented, is stale or links to nothing is an error."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import pyarrow as pa
import pytest
import typer

import batchjob
from batchjob import errors
from batchjob.cli.main import app
from batchjob.job.job import AnyModel, AnySource, AnyTask
from batchjob.job.json_schema import job_json_schema
from docs.generate import architecture, command_line, exit_codes, job_file, output_columns, python_api
from docs.generate.__main__ import PAGES, main
from docs.generate.links import find_dead_links, headings
from docs.generate.markdown import UndocumentedError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy of docs/ with its generated pages."""
    for name in PAGES:
        target = tmp_path / "docs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docs" / name, target)
    return tmp_path / "docs"


@pytest.fixture
def schema() -> dict[str, Any]:
    """The JSON schema of a job, to be changed."""
    return job_json_schema()


# --------------------------------------------------------------------------------------------------------------- pages


def test_job_file_page_has_every_field_of_every_kind(schema: dict[str, Any]) -> None:
    page = job_file.page()
    for definition in schema["$defs"].values():
        for name, field in definition["properties"].items():
            description = " ".join(field.get("description", "").split()).replace("|", "\\|")
            assert "const" in field or f"| `{name}` | " in page
            assert description in page
    for union in (AnySource, AnyModel, AnyTask):
        for kind in get_args(get_args(union)[0]):
            assert f", `type: {kind.model_fields['type'].default}`" in page


def test_field_without_description_is_refused(schema: dict[str, Any]) -> None:
    del schema["$defs"]["Runtime"]["properties"]["batch_size"]["description"]
    schema["$defs"]["Workers"]["description"] = ""
    with pytest.raises(UndocumentedError, match=r"Attributes.*: Runtime\.batch_size, Workers$"):
        job_file.check_descriptions(schema)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}, "integer ≥ 1, or `auto`"),
        ({"enum": ["on", "off"]}, "`on`, `off`"),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"type": "object", "additionalProperties": True}, "mapping"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number > 0 and ≤ 1"),
        ({"$ref": "#/$defs/Workers"}, "[section](#runtimeworkers)"),
    ],
)
def test_type_of_a_field_in_words(field: dict[str, Any], words: str) -> None:
    assert job_file.describe_type(field, "runtime.workers") == words


def test_command_line_page_has_every_option_of_every_command() -> None:
    page = command_line.page()
    names = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    assert names[0] == "run"
    for name in names:
        assert f"## `batchjob {name}`" in page
    for option in ("`--param`, `-p`", "`--json`", "`--quiet`, `-q`", "`--version`", "`--limit` | integer | `20`"):
        assert f"| {option}" in page


def test_option_without_help_is_refused() -> None:
    def command(images: Annotated[int, typer.Option()] = 3) -> None:
        """Do something."""

    with pytest.raises(UndocumentedError, match="batchjob command: images has no help"):
        command_line.list_parameters(command)


def test_output_columns_are_those_of_the_tasks() -> None:
    page = output_columns.page()
    assert "| `position` | `int64` |" in page
    assert "| `detections[].x_min` | `float32` |" in page
    assert output_columns.describe_type(pa.list_(pa.float32(), 3)) == "list<float32>[3]"


def test_column_without_meaning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    title, task, output, _ = output_columns.EXAMPLES[0]
    monkeypatch.setattr(output_columns, "EXAMPLES", [(title, task, output, {}), *output_columns.EXAMPLES[1:]])
    with pytest.raises(UndocumentedError, match="what is in label_id, label, score, top_k"):
        output_columns.page()


def test_task_without_example_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_columns, "EXAMPLES", output_columns.EXAMPLES[1:])
    with pytest.raises(UndocumentedError, match=r"add an example .*: ClassificationTask"):
        output_columns.page()


def test_exit_codes_page_has_every_exception_that_ends_a_job() -> None:
    page = exit_codes.page()
    for name in errors.__all__:
        item = getattr(errors, name)
        if isinstance(item, type) and issubclass(item, errors.JobError):
            assert f"| `{name}` | {item.exit_code} |" in page


def test_exit_code_without_meaning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.CheckFailed, "exit_code", 9)
    with pytest.raises(UndocumentedError, match="explain exit code 9"):
        exit_codes.page()


def test_python_api_page_has_every_public_name() -> None:
    names = {name for name in batchjob.__all__ if not name.startswith("__")}
    assert set(re.findall(r"^::: batchjob\.(\w+)$", python_api.page(), re.MULTILINE)) == names


def test_method_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(python_api.MEMBERS, "Job", ["from_file", "gone"])
    with pytest.raises(UndocumentedError, match=r"batchjob\.Job\.gone"):
        python_api.page()


def test_architecture_page_lists_every_file_once() -> None:
    package, folder, found = ROOT / "batchjob", "", []
    for line in architecture.page().splitlines():
        if heading := re.fullmatch(r"### `(.+)/`", line):
            folder = "" if heading[1] == "batchjob" else f"{heading[1]}/"
        elif item := re.match(r"\* `(.+?\.py)`: .", line):
            found.append(folder + item[1])
    # In folders, `__init__.py` is empty.
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    assert Counter(found) == Counter(file for file in files if "/" not in file or not file.endswith("/__init__.py"))


def test_architecture_page_has_the_import_rules() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", architecture.import_table(), re.MULTILINE))
    assert rows.keys() >= {path.parent.name for path in (ROOT / "batchjob").glob("*/__init__.py")}
    assert rows["storage"] == "nothing"


# --------------------------------------------------------------------------------------------------------------- check


def test_pages_of_the_repository_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(check=True) == 0, capsys.readouterr().err


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "more\n")


@pytest.mark.parametrize("change", [edit, Path.unlink])
def test_stale_page_is_named_and_left_alone(
    folder: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder / "reference/job-file.md")
    before = sorted(folder.rglob("*.md"))
    assert main(folder, check=True) == 1
    assert capsys.readouterr().err == "docs/reference/job-file.md is stale; write it again with `make docs-pages`\n"
    assert sorted(folder.rglob("*.md")) == before


def test_pages_are_written_where_they_are_stale(folder: Path) -> None:
    edit(folder / "reference/exit-codes.md")
    assert main(folder) == 0
    assert main(folder, check=True) == 0


def test_links_of_files_beside_docs_are_checked(folder: Path) -> None:
    folder.with_name("GUIDE.md").write_text("# Some title\n\n`[code](gone.md)` [here](GUIDE.md#some-title)\n")
    assert main(folder, check=True) == 0
    folder.with_name("README.md").write_text("[a](GUIDE.md#gone) [b](docs/gone.md) [c](https://example.com)\n")
    assert main(folder, check=True) == 1
    assert list(find_dead_links(folder.parent)) == [
        "README.md: GUIDE.md#gone: there is no such heading",
        "README.md: docs/gone.md: there is no such file",
    ]


def test_headings_have_the_anchors_of_github_and_mkdocs() -> None:
    text = "# One, `type: two`\n\n```bash\n# no heading\n```\n\n### `a.b` [link](x.md) ###\n"
    assert headings(text) == {"one-type-two", "ab-link"}
