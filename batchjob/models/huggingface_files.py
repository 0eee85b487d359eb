"""A model of transformers as `save_pretrained` leaves it: which files it is made of, and where they lie."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob, StorageError
from batchjob.models.huggingface_hub import convert_hub_error, silence_hub_libraries
from batchjob.models.weights import read_file
from batchjob.settings import is_local, local_path

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["ModelFiles", "download_from_hub", "list_model_files", "local_copy"]

_CONFIG = "config.json"
_BESIDE = ("preprocessor_config.json", "processor_config.json")
_SAFE, _PICKLED = ("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")


@dataclass(frozen=True)
class ModelFiles:
    """What a folder holds of a model.

    Attributes:
        folder: where it lies, with a `/` at its end.
        config: the content of `config.json`.
        weights: names of the files of weights, sorted.
        others: names of all other files that are needed.
    """

    folder: str
    config: dict[str, Any]
    weights: tuple[str, ...]
    other_files: tuple[str, ...]


def list_model_files(reader: Reader, folder: str) -> ModelFiles:
    """Which files make up the model in a folder; reads only what is JSON.

    Raises:
        InvalidJob: it holds no model, or none that PyTorch reads.
        Unavailable: the store cannot be reached.
    """
    folder = folder.rstrip("/") + "/"
    try:
        names = {one.uri[len(folder) :] for one in reader.list(folder, recursive=False)}
    except StorageError as error:
        raise InvalidJob(f"model.model: {folder} cannot be listed: {error.message}") from error
    if _CONFIG not in names:
        listed = ", ".join(sorted(names)[:6]) or "nothing"
        raise InvalidJob(
            f"model.model: {folder} holds {listed}, but no {_CONFIG}; "
            "name a folder that model.save_pretrained() has written, or a model of the Hugging Face Hub"
        )
    config = _json(reader, folder + _CONFIG)
    index = next((f"{name}.index.json" for name in (_SAFE[0], _PICKLED[0]) if f"{name}.index.json" in names), None)
    for whole in (_SAFE[0], _PICKLED[0]):
        if whole in names:
            return ModelFiles(folder, config, (whole,), _others(names))
        if index is not None and index.startswith(whole):
            weights = sorted({str(name) for name in _json(reader, folder + index).get("weight_map", {}).values()})
            lacking = [name for name in weights if name not in names]
            if lacking or not weights:
                raise InvalidJob(f"model.model: {folder} lacks {', '.join(lacking) or 'weights'}, which {index} names")
            return ModelFiles(folder, config, tuple(weights), (index, *_others(names)))
    raise InvalidJob(
        f"model.model: {folder} holds neither {_SAFE[0]} nor {_PICKLED[0]}; save it from PyTorch with "
        "model.save_pretrained()"
    )


def _others(names: set[str]) -> tuple[str, ...]:
    return (_CONFIG, *(name for name in _BESIDE if name in names))


def _json(reader: Reader, uri: str) -> dict[str, Any]:
    try:
        found = json.loads(read_file(reader, uri, "model.model"))
    except ValueError as error:
        raise InvalidJob(f"model.model: {uri} is no JSON ({error}); copy it there again") from error
    if not isinstance(found, dict):
        raise InvalidJob(f"model.model: {uri} holds no JSON object; copy it there again")
    return found


@contextmanager
def local_copy(reader: Reader, files: ModelFiles) -> Iterator[tuple[Path, str, str]]:
    """The model's folder on this machine for a while, its digest, and that of its weights alone.

    A folder that lies on this machine is taken as it is; the files of any other are copied to a temporary one.
    """
    weights, everything = hashlib.sha256(), hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="batchjob-model-") as spool:
        here = local_path(files.folder) if is_local(files.folder) else Path(spool)
        for name in (*files.weights, *files.other_files):
            data = read_file(reader, files.folder + name, "model.model")
            if name in files.weights:
                weights.update(data)
            else:
                everything.update(f"{name} {len(data)}\n".encode() + data)
            if not is_local(files.folder):
                (here / name).write_bytes(data)
            del data  # one file at a time in memory
        everything.update(weights.digest())
        yield here, everything.hexdigest(), weights.hexdigest()


def download_from_hub(name: str, revision: str | None) -> str:
    """The folder of a model of the Hugging Face Hub in the local cache, fetched there where it is not yet.

    Raises:
        InvalidJob: there is no such model, or it needs a token.
        Unavailable: it is not in the cache, and there is no way out.
    """
    folder = _fetched(name, revision, _SAFE)
    if not any(path.name.endswith(".safetensors") for path in folder.iterdir()):
        folder = _fetched(name, revision, _PICKLED)
    return f"{folder}/"


def _fetched(name: str, revision: str | None, weights: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [_CONFIG, *_BESIDE, *weights, f"{weights[0]}.index.json"]
    try:
        with silence_hub_libraries():
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        advice = "fetch it elsewhere and set model.model to the folder that holds it"
        fault = convert_hub_error(error, f"the model {name}", advice)
        if fault is None:
            raise
        raise fault from error
