"""Page of the Python API: every public name of the package, which mkdocstrings then describes from the docstrings."""

from __future__ import annotations

import inspect
from typing import Any

import batchjob
from docs.generate.markdown import UndocumentedError, notice

__all__ = ["MEMBERS", "page"]

_INTRODUCTION = """\
Every name that `import batchjob` gives. Nothing heavy is imported before it is used. Settings classes have the fields
of [the job file](job-file.md), where their types and defaults are listed.

A whole script. It needs no `if __name__ == "__main__":`, and the model may be one of its own functions:

<!-- images: photos 20 -->
```python title="predict.py"
import torch
from batchjob import InvalidJob, Job, Output, PrefixSource, Preprocess, PythonModel, RegressionTask, Runtime, run


def brightness() -> torch.nn.Module:
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((1, 2, 3))

    return Mean()


job = Job(
    input=PrefixSource(uri="photos"),
    model=PythonModel(target=brightness),
    preprocess=Preprocess(resize=64, crop=64, mean=None, std=None),
    task=RegressionTask(),
    runtime=Runtime(pool="local"),
    output=Output(uri="out/brightness"),
)
try:
    result = run(job, progress=True).raise_for_status()
except InvalidJob as error:
    raise SystemExit(f"{error}") from None  # one sentence: what is wrong, where, what to type next
print(result.table().to_table(columns=["uri", "value"]).slice(0, 3))
for row in result.errors():
    print(row["uri"], row["error_message"])
```

```bash
python predict.py
```"""
# Group -> first parts of the modules that its names come from; the first that fits counts.
_GROUPS = {
    "Functions": ("batchjob.api",),
    "Job and result": ("batchjob.job.job", "batchjob.report"),
    "Sources": ("batchjob.sources",),
    "Models": ("batchjob.models",),
    "Tasks": ("batchjob.tasks",),
    "Other settings": ("batchjob.job", "batchjob.loader", "batchjob.preprocessing", "batchjob.storage"),
    "Exceptions": ("batchjob.errors",),
}
# Methods to show of classes that users call methods of; the methods of settings are called by the package itself.
MEMBERS = {
    "Job": ["from_file", "folder"],
    "RunResult": ["raise_for_status", "table", "errors", "to_text", "to_json"],
}


def page() -> str:
    """Return the text of the page.

    Raises:
        UndocumentedError: A public name has no docstring.
    """
    groups: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for name in batchjob.__all__:
        if not name.startswith("__"):
            groups[_find_group(name)].append(name)
    parts = ["# Python API", notice("`batchjob.__all__`"), _INTRODUCTION]
    for group, names in groups.items():
        parts += [f"## {group}", "\n".join(map(_summarize, names))] if names else []
        parts += map(_describe, names)
    return "\n\n".join(parts) + "\n"


def _find_group(name: str) -> str:
    item: Any = getattr(batchjob, name)
    if not inspect.getdoc(item):
        raise UndocumentedError(f"batchjob.{name} has no docstring")
    matches = [group for group, modules in _GROUPS.items() if item.__module__.startswith(modules)]
    return matches[0] if matches else "Other settings"


def _summarize(name: str) -> str:
    """Return a list item: the call of a function or the name of a class, and its first sentence."""
    item: Any = getattr(batchjob, name)
    parameters = "" if isinstance(item, type) else f"({', '.join(inspect.signature(item).parameters)})"
    return f"* `{name}{parameters}`: {(inspect.getdoc(item) or '').splitlines()[0]}"


def _describe(name: str) -> str:
    """Return the instruction for mkdocstrings that describes a name; of a class, its attributes and `MEMBERS`."""
    instruction = f"::: batchjob.{name}"
    item = getattr(batchjob, name)
    if not isinstance(item, type):
        return instruction
    members = MEMBERS.get(name, [])
    if missing := [member for member in members if not hasattr(item, member)]:
        raise UndocumentedError(f"batchjob.{name}.{missing[0]} is gone")
    return f"{instruction}\n    options:\n      members: [{', '.join(members)}]"
