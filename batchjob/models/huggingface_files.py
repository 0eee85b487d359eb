"""Files of a transformers model, as `save_pretrained` writes them: list, download, or copy them to a local folder."""

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
from batchjob.uris import is_local, local_path

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["ModelFiles", "download_from_hub", "list_model_files", "local_copy"]

_CONFIG = "config.json"
_PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
# Names of the weights: one file, or a pattern for several. safetensors first, because it holds no code.
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin")


@dataclass(frozen=True)
class ModelFiles:
    """Files of one model in a folder.

    Attributes:
        folder: Local path or URI of the folder, with a `/` at its end.
        config: Content of `config.json`.
        weights: Names of the weight files, sorted.
        other_files: Names of all other files that are needed.
    """

    folder: str
    config: dict[str, Any]
    weights: tuple[str, ...]
    other_files: tuple[str, ...]


def list_model_files(reader: Reader, folder: str) -> ModelFiles:
    """List the files of the model in a folder. Of their contents only JSON files are read.

    Raises:
        InvalidJob: The folder holds no model, or none with weights for PyTorch.
        Unavailable: The store cannot be reached.
    """
    folder = folder.rstrip("/") + "/"
    try:
        names = {entry.uri[len(folder) :] for entry in reader.list(folder, recursive=False)}
    except StorageError as error:
        raise InvalidJob(f"model.model: {folder} cannot be listed: {error.message}") from error
    if _CONFIG not in names:
        present = ", ".join(sorted(names)[:6]) or "nothing"
        raise InvalidJob(
            f"model.model: {folder} holds {present}, but no {_CONFIG}; "
            "name a folder that model.save_pretrained() has written, or a model of the Hugging Face Hub"
        )
    config = _read_json(reader, folder + _CONFIG)
    others = (_CONFIG, *(name for name in _PROCESSOR_CONFIGS if name in names))
    single_files = (_SAFETENSORS[0], _PICKLED[0])
    index = next((f"{name}.index.json" for name in single_files if f"{name}.index.json" in names), None)
    for single_file in single_files:
        if single_file in names:
            return ModelFiles(folder, config, (single_file,), others)
        if index is not None and index.startswith(single_file):
            # Example of an index: {"weight_map": {"fc.weight": "model-00001-of-00002.safetensors", …}}
            weights = sorted({str(name) for name in _read_json(reader, folder + index).get("weight_map", {}).values()})
            missing = [name for name in weights if name not in names]
            if missing or not weights:
                raise InvalidJob(f"model.model: {folder} lacks {', '.join(missing) or 'weights'}, which {index} names")
            return ModelFiles(folder, config, tuple(weights), (index, *others))
    raise InvalidJob(
        f"model.model: {folder} holds neither {_SAFETENSORS[0]} nor {_PICKLED[0]}; save it from PyTorch with "
        "model.save_pretrained()"
    )


@contextmanager
def local_copy(reader: Reader, files: ModelFiles) -> Iterator[tuple[Path, str, str]]:
    """Provide the files of a model in a local folder, for as long as the context is open.

    A folder on this machine is used directly; files from elsewhere are copied to a temporary folder.

    Yields:
        The folder, the hexadecimal SHA-256 of all files, and that of the weight files alone, one after the other.
    """
    weights_digest, digest = hashlib.sha256(), hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="batchjob-model-") as temporary:
        folder = local_path(files.folder) if is_local(files.folder) else Path(temporary)
        for name in (*files.weights, *files.other_files):
            data = read_file(reader, files.folder + name, "model.model")
            if name in files.weights:
                weights_digest.update(data)
            else:
                digest.update(f"{name} {len(data)}\n".encode() + data)
            if not is_local(files.folder):
                (folder / name).write_bytes(data)
            del data  # At most one file is in memory.
        digest.update(weights_digest.digest())
        yield folder, digest.hexdigest(), weights_digest.hexdigest()


def download_from_hub(name: str, revision: str | None) -> str:
    """Download a model from the Hugging Face Hub to the local cache, unless it is there already.

    Args:
        name: Name on the Hub: "google/vit-base-patch16-224".
        revision: Branch, tag or commit; None for the default branch.

    Returns:
        Its folder in the cache, with a `/` at its end.

    Raises:
        InvalidJob: There is no such model, or it needs a token.
        Unavailable: It is not in the cache, and the Hub cannot be reached.
    """
    folder = _download_snapshot(name, revision, _SAFETENSORS)
    if not any(path.name.endswith(".safetensors") for path in folder.iterdir()):
        folder = _download_snapshot(name, revision, _PICKLED)
    return f"{folder}/"


def _read_json(reader: Reader, uri: str) -> dict[str, Any]:
    try:
        content = json.loads(read_file(reader, uri, "model.model"))
    except ValueError as error:
        raise InvalidJob(f"model.model: {uri} is no JSON ({error}); copy it there again") from error
    if not isinstance(content, dict):
        raise InvalidJob(f"model.model: {uri} holds no JSON object; copy it there again")
    return content


def _download_snapshot(name: str, revision: str | None, weights: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [_CONFIG, *_PROCESSOR_CONFIGS, *weights, f"{weights[0]}.index.json"]
    try:
        with silence_hub_libraries():
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        advice = "fetch it elsewhere and set model.model to the folder that holds it"
        hub_error = convert_hub_error(error, f"the model {name}", advice)
        if hub_error is None:
            raise
        raise hub_error from error
