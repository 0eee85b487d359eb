"""Page of the architecture: the tree of batchjob/ with first docstring lines, and the import table."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

from docs.generate.markdown import notice

__all__ = ["first_line", "import_table", "page", "tree"]

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "batchjob"
RULES = ROOT / "tests" / "unit" / "test_architecture.py"

# What each package is for, in the order of the data path.
PACKAGES = {
    "cli": "The command line: arguments in, exit code out.",
    "job": "The job file: settings of a job, read from YAML, checked, written, fingerprinted.",
    "sources": "Lists images. Extension point: one file per kind (copy `prefix.py`; add it to `job/job.py`).",
    "plan": "The frozen list of image refs of an output, cut into shards.",
    "driver": "The process that plans a run, hands shards to workers, and finishes the output.",
    "pool": "Workers in this process or on a Ray cluster, behind one protocol. Only `ray_*.py` imports ray.",
    "worker": "Composition root of the data path: one loaded model, one plan, one loop over shards.",
    "loader": "Turns shards into pinned uint8 batches by torch's DataLoader, whose processes an image may kill "
    "([how](crash-isolation.md)).",
    "preprocessing": "Turns encoded bytes into pixels, and pixels into what the model was trained on.",
    "models": "Turns weights into a ready module. Extension point: one file per format (copy `checkpoint.py`).",
    "inference": "Turns batches into predictions; `autotune/` chooses the execution config.",
    "tasks": "Turns model outputs into Arrow columns. Extension point: one file per task (copy `regression.py`).",
    "output": "Turns rows into Parquet parts, and commits them.",
    "storage": "Turns URIs into bytes. The only package that imports fsspec, obstore or boto3.",
    "report": "What a run or an output says, as data, JSON and text.",
    "functions": "Functions and classes that stand where a job file says `module:attribute`: by name, or by value.",
    "bench": "`batchjob bench`: the ceiling of each stage, and the run as a share of it.",
}
INTRODUCTION = """\
A **source** lists images; a **plan** cuts them into **shards**; the **driver** hands shards to **workers** in a
**pool** (this process, or Ray actors). A worker holds one loaded **model** and turns a shard into rows: batches of a
**loader** (torch's DataLoader), **inference**, a **task**, one **part**. One conditional PUT **commits** the part. A
**report** adds it up.

```text
 job file ─► job/ ─► api, cli/ ─► driver/                  (control: who runs what, when)

 URI ─► sources/ ─► plan/ ─────────────► driver/ ◄───────────────── output/ ─► report/
        ImageRef    shards, chunks       scheduler, lease           committed parts
                    (written once)          │ pool/ : submit, wait        ▲
                                   ┌────────┴────────┐                    │
                               local_pool         ray_pool  ◄ only pool/ray_* imports ray
                                   └────────┬────────┘                    │
                                         worker/   composition root of the data path
  storage/ ─► loader/ ──────────► inference/ ───────► tasks/ ─► output/ ──┘
  bytes       torch DataLoader    inference_mode      Arrow     one Parquet part,
              preprocessing/      autocast, streams   columns   one conditional PUT
              pinned batches      models/
```
"""


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def tree() -> str:
    """Draw batchjob/ as nested lists, each file with its first docstring line."""
    lines = [f"* `{path.name}`: {first_line(path)}" for path in sorted(PACKAGE.glob("*.py"))]
    for name, purpose in PACKAGES.items():
        folder = PACKAGE / name
        if not folder.is_dir():
            continue
        lines += ["", f"### `{name}/`", "", purpose, ""]
        for path in sorted(folder.rglob("*.py"), key=lambda path: (path.parent != folder, path)):
            if path.name != "__init__.py":
                lines.append(f"* `{path.relative_to(folder).as_posix()}`: {first_line(path)}")
    return "\n".join(lines)


def import_table() -> str:
    """Write the import rules of the architecture test as a Markdown table."""
    rules = runpy.run_path(str(RULES))
    everywhere, imports = rules["EVERYWHERE"], rules["IMPORTS"]
    rows = [f"Every package may import {', '.join(f'`{name}`' for name in everywhere)}.", ""]
    rows += ["| package | may also import |", "|---|---|"]
    for name, others in imports.items():
        if (PACKAGE / name).is_dir() or name == "api":
            rows.append(f"| `{name}` | {', '.join(f'`{other}`' for other in others) or 'nothing'} |")
    return "\n".join(rows)


def page() -> str:
    """Return the text of the page."""
    return (
        f"# Architecture\n\n{notice('docstrings and the import rules')}\n\n{INTRODUCTION}\n"
        f"## The tree\n\n### `batchjob/`\n\n{tree()}\n\n## Who may import whom\n\n{import_table()}\n"
    )
