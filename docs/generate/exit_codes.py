"""Page of the exit codes: each code with its exceptions, and what a scheduler should do."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from batchjob import errors
from batchjob.errors import BatchjobError, JobError
from docs.generate.markdown import UndocumentedError, notice, table

__all__ = ["page"]

_INTRODUCTION = """\
Exit codes of every command, and the exception that has the same meaning in Python. The guide [when it
fails](../guides/when-it-fails.md) goes through them one by one; [scheduling](../guides/scheduling.md) shows them in
schedulers."""
# Meaning of each code, and what a scheduler should do.
_MEANINGS = {
    0: ("Complete, or already complete.", "Go on."),
    1: ("Unexpected crash: a bug here, or in a library.", "Do not retry; somebody looks at the traceback."),
    2: (
        "Wrong usage or configuration, or an output with another job's plan; said before the first image is read.",
        "Never retry; somebody mends the job.",
    ),
    3: (
        "More error rows than the job allows, or a failed check of the output. There is no `_SUCCESS`.",
        "Do not retry; somebody looks at `batchjob errors OUT`.",
    ),
    4: ("Incomplete: shards were given up after all their attempts.", "Retry a few times: the same command resumes."),
    75: (
        "Temporary: input not there yet, another driver at work, store or cluster lost, or stopped by a signal.",
        "Always retry, later: the same command resumes.",
    ),
}
_TREE = """\
Exceptions of `batchjob.errors`. Those below `JobError` end a job; the `message` of one is the sentence that the command
line prints."""


def page() -> str:
    """Return the text of the page.

    Raises:
        UndocumentedError: An exception has a code that this page does not explain, or no docstring.
    """
    parts = ["# Exit codes", notice("the exceptions"), _INTRODUCTION]
    header = ["code", "meaning", "exception", "a scheduler should"]
    parts.append(table(header, [_row(code) for code in sorted({*_MEANINGS, *_exceptions_by_code()})]))
    parts += ["## Exceptions", _TREE, f"```text\n{_tree()}\n```"]
    exceptions = [error for error in _all_exceptions() if issubclass(error, JobError)]
    rows = [[f"`{error.__name__}`", str(error.exit_code), _first_sentence(error)] for error in exceptions]
    parts.append(table(["exception", "exit code", "meaning"], rows))
    return "\n\n".join(parts) + "\n"


def _row(code: int) -> list[str]:
    if code not in _MEANINGS:
        raise UndocumentedError(f"explain exit code {code} in docs/generate/exit_codes.py")
    meaning, action = _MEANINGS[code]
    # Subclasses that only inherit a code are shown in the tree.
    own = [error.__name__ for error in _exceptions_by_code().get(code, ()) if "exit_code" in vars(error)]
    return [str(code), meaning, ", ".join(f"`{name}`" for name in own), action]


def _exceptions_by_code() -> dict[int, list[type[BatchjobError]]]:
    codes: dict[int, list[type[BatchjobError]]] = {}
    for error in _all_exceptions():
        if error is BatchjobError or issubclass(error, JobError):
            codes.setdefault(error.exit_code, []).append(error)
    return codes


def _all_exceptions() -> Iterator[type[BatchjobError]]:
    for name in errors.__all__:
        item = getattr(errors, name)
        if isinstance(item, type) and issubclass(item, BatchjobError):
            yield item


def _first_sentence(error: type[BatchjobError]) -> str:
    if not (text := inspect.getdoc(error)):
        raise UndocumentedError(f"{error.__name__} has no docstring")
    return text.partition("\n\n")[0]


def _tree() -> str:
    """Return the tree of exceptions that stands in the docstring of the module."""
    return (inspect.getdoc(errors) or "").split("```")[1].strip("\n")
