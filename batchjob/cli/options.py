"""Arguments and options of the commands, and the job or output that they name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchjob.errors import InvalidJob

if TYPE_CHECKING:
    from batchjob.job.job import Job
    from batchjob.storage.options import OptionsByPrefix

__all__ = [
    "AllowEmpty",
    "AsJson",
    "Endpoint",
    "JobFile",
    "OutputOrJobFile",
    "Overrides",
    "Params",
    "PoolName",
    "QuietFlag",
    "RayAddress",
    "Region",
    "RunPool",
    "TargetFormat",
    "read_job",
    "resolve_output",
]


class TargetFormat(StrEnum):
    """Formats that `convert --to` writes."""

    onnx = "onnx"
    exported = "exported"
    aoti = "aoti"
    torchscript = "torchscript"
    int8 = "int8"
    pruned = "pruned"
    tensorrt = "tensorrt"


class PoolName(StrEnum):
    """Values of `runtime.pool`."""

    ray = "ray"
    local = "local"


JobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="The job file.")]
OutputOrJobFile = Annotated[
    str, typer.Argument(metavar="OUT", help="An output's path or URI, or the job file that writes it.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Settings that replace the job file's.")
]
Params = Annotated[
    list[str] | None, typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter of the job; repeatable.")
]
RunPool = Annotated[PoolName | None, typer.Option(help="Where workers run; same as runtime.pool=….")]
RayAddress = Annotated[str | None, typer.Option(help="Ray cluster; else RAY_ADDRESS, else one started here.")]
AsJson = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
AllowEmpty = Annotated[bool, typer.Option("--allow-empty", help="An input without images is fine.")]
Endpoint = Annotated[str | None, typer.Option(help="URL of an S3 server other than AWS, where OUT is a URI.")]
Region = Annotated[str | None, typer.Option(help="Region of the store, where OUT is a URI.")]


def read_job(path: str, params: Sequence[str] | None, overrides: Sequence[str] | None) -> Job:
    """Read a job file with the parameters and overrides of the command line.

    Args:
        path: Path of the job file.
        params: `name=value`, one for each `-p`.
        overrides: `section.key=value`.

    Raises:
        BadParameter: A parameter has no `=` or is given twice.
        InvalidJob: The job file is not there, or has faults.
    """
    from batchjob.job.job import Job

    values: dict[str, str] = {}
    for param in params or ():
        name, equals, value = param.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{param!r} is no parameter; write -p name=value")
        if name in values:
            raise typer.BadParameter(f"-p {name}=… is given twice; keep one")
        values[name] = value
    return Job.from_file(path, values, overrides or ())


def resolve_output(
    where: str, params: Sequence[str] | None, overrides: Sequence[str] | None, endpoint: str | None, region: str | None
) -> tuple[str, OptionsByPrefix]:
    """Find the URI and the storage options of an output.

    Args:
        where: Path or URI of an output, or path of the job file that writes it.
        params: Parameters of the job file.
        overrides: Overrides of the job file.
        endpoint: URL of an S3 server; used where `where` is a URI.
        region: Region of the store; used where `where` is a URI.

    Raises:
        BadParameter: `where` is empty; or parameters or overrides are given and it is no job file.
        InvalidJob: The job file is not there, or has faults.
    """
    from batchjob.settings import resolve_path
    from batchjob.uris import is_local

    if not where.strip():  # such as "$OUT" where that variable is not set
        raise typer.BadParameter("the output's name is empty; name a job file, or an output's folder or URI")
    path: Path | None = None
    if is_local(where):
        try:
            path = resolve_path(where)
        except ValueError as error:
            raise InvalidJob(f"{where}: {error}") from error
    if path is not None and path.suffix in (".yaml", ".yml"):
        if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
            raise InvalidJob(f"{where}: no such file; name a job file, or an output's folder or URI")
        if path.is_file():
            job = read_job(where, params, overrides)
            return job.output.uri, job.storage
    if params or overrides:
        raise typer.BadParameter(f"{where} is no job file, so it takes neither -p nor section.key=value")
    if path is not None:
        return str(path), {}
    from batchjob.storage.options import StorageOptions

    scheme, separator, _ = where.partition("://")
    return where, {scheme + separator: StorageOptions(endpoint=endpoint, region=region)}
