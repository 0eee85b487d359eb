"""Weight files: read one, and load the state dict in it into a module; every key that does not fit is named."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob, NotFound, StorageError
from batchjob.models.checkpoint_reader import read_checkpoint
from batchjob.models.checkpoint_tensors import CheckpointTensors, list_names
from batchjob.models.state_dict_search import StateDictMatch, find_state_dict
from batchjob.text import format_count
from batchjob.uris import is_local, local_path

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.models.state_dict_selection import StateDictSelection
    from batchjob.storage.reader import Reader

__all__ = ["LoadedWeights", "check_file_exists", "hash_state_dict", "load_weights", "read_file"]

_log = logging.getLogger(__name__)


def read_file(reader: Reader, uri: str, key: str) -> bytes:
    """Read a file that the job names under `key`.

    Raises:
        InvalidJob: The file does not exist, or may not be read.
        Unavailable: The store cannot be reached.
    """
    try:
        data: bytes = reader.read(uri).data
    except StorageError as error:
        raise _convert_storage_error(error, uri, key) from error
    return data


def check_file_exists(reader: Reader, uri: str, key: str) -> None:
    """Check that a file exists that the job names under `key`, without reading it.

    Raises:
        InvalidJob: The file does not exist, or may not be read.
        Unavailable: The store cannot be reached.
    """
    try:
        reader.stat(uri)
    except StorageError as error:
        raise _convert_storage_error(error, uri, key) from error


@dataclass(frozen=True)
class LoadedWeights:
    """Place in a file from which the weights of a module were loaded.

    Attributes:
        note: Sentence about the place, for the log and the report; None if the file is a state dict as it is.
        variant: Text that is part of the model's digest: the place, unless it is the conventional one.
    """

    note: str | None
    variant: str | None

    @property
    def notes(self) -> tuple[str, ...]:
        """The note, if there is one."""
        return (self.note,) if self.note else ()

    def complete_digest(self, file_digest: str) -> str:
        """Return the digest of the weights: that of the file, with the place if another version might choose another.

        Example: two runs of one plan that take plain and averaged weights from one file have different digests.
        """
        return hashlib.sha256(f"{file_digest} {self.variant}".encode()).hexdigest() if self.variant else file_digest


def load_weights(  # noqa: PLR0913 - what the formats know of their files
    module: nn.Module,
    data: bytes,
    uri: str,
    selection: StateDictSelection,
    *,
    model: str,
    advice: str,
    strict: bool = True,
    first_keys: Sequence[str] = (),
    rename: Callable[[str], str] = str,
    is_ignored: Callable[[str], bool] = lambda _: False,
    takes_num_classes: bool = True,
) -> LoadedWeights:
    """Load the one state dict of a file that fits a module into it.

    Args:
        module: Module to fill.
        data: Content of a file by torch.save or safetensors; the format is detected from it.
        uri: Location of the file, for error messages.
        selection: What the job says about the place in the file.
        model: Name of the model, for error messages.
        advice: End of the error message: the job keys to correct.
        strict: False allows keys that only the file or only the module has; a tensor of another shape is always an
            error.
        first_keys: Outermost keys of the file that win, the first that fits, where the job does not say which.
        rename: Function from names in the file to those of today's modules.
        is_ignored: True for names of the file that the module need not have.
        takes_num_classes: False for a function of the user that has no such parameter.

    Raises:
        InvalidJob: The file has another format, is incomplete, holds code, or holds no state dict; two fit; or keys are
            missing, unknown, or have tensors of another shape. The message names them.
    """
    where = f"model.weights: {uri} does not fit {model}"
    tensors = CheckpointTensors.collect(read_checkpoint(data, f"model.weights: {uri}"), f"model.weights: {uri}", rename)
    expected = module.state_dict()
    found = find_state_dict(
        tensors, expected, selection, where=where, strict=strict, first_keys=first_keys, is_ignored=is_ignored
    )
    where += f" ({found.place})" if found.place else ""
    if found.doubles:
        raise InvalidJob(
            f"{where}: the file holds both {' and '.join(found.doubles)}; save the state dict of one module"
        )
    missing, unexpected = _load_match(module, found, f"{where}: ", advice)
    # Shapes by key: of the tensor in the file, and of the one in the module.
    shapes = {key: (found.matched[key].value, expected[key]) for key in found.misshaped}
    missing = [key for key in missing if key not in shapes]
    if shapes or (strict and (missing or unexpected)) or not found.matched:
        if not found.matched and not shapes:
            raise InvalidJob(f"{where}: {_describe_strangers(tensors, expected)}")
        class_hint = _suggest_num_classes(shapes, takes_num_classes) if not missing and not unexpected else None
        raise InvalidJob(f"{where}: {_describe_differences(missing, unexpected, shapes)}; {class_hint or advice}")
    if missing or unexpected:
        _log.warning("%s, let pass by strict: false: %s", where, _describe_differences(missing, unexpected, {}))
    return LoadedWeights(_describe_place(found, uri), None if found.is_conventional else found.yaml)


def _load_match(module: nn.Module, found: StateDictMatch, where: str, advice: str) -> tuple[list[str], list[str]]:
    """Load the tensors of the right shape; return the keys that torch finds missing, and those it does not know."""
    leaves = {key: leaf for key, leaf in found.matched.items() if key not in found.misshaped}
    state = _VersionedStateDict(
        {key: leaf.value for key, leaf in (leaves | dict(found.unexpected)).items()}, found.versions
    )
    try:
        result = module.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InvalidJob(f"{where}{' '.join(str(error).split())[:500]}; {advice}") from error
    return list(result.missing_keys), list(result.unexpected_keys)


def _describe_place(found: StateDictMatch, uri: str) -> str | None:
    if not found.key and not found.strip:
        return None
    sentence = f"weights: {uri.rsplit('/', 1)[-1]} {found.place}"
    if found.aside:
        sentence += f"; {format_count(len(found.aside), 'other tensor')} left aside ({list_names(found.aside)})"
    if found.rivals:
        sentence += f"; it also fits model.checkpoint: {' or '.join(found.rivals[:2])}"
    return sentence


def hash_state_dict(module: nn.Module) -> str:
    """Compute the hexadecimal SHA-256 of names, types, shapes and values of parameters and persistent buffers."""
    import torch
    from torch.nn.parameter import is_lazy

    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        # Lazy weights have neither shape nor values yet.
        if not isinstance(value, torch.Tensor) or is_lazy(value):
            continue
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        plain = value.int_repr() if value.is_quantized else value
        plain = plain.to_dense() if plain.layout != torch.strided else plain
        digest.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _convert_storage_error(error: StorageError, uri: str, key: str) -> InvalidJob:
    if isinstance(error, NotFound):
        if is_local(uri) and local_path(uri).is_dir():
            files = sorted(path.name for path in local_path(uri).iterdir() if path.is_file())
            inside = f"; it holds {list_names(files)}" if files else ""
            return InvalidJob(f"{key}: {uri} is a folder; name a file{inside}")
        return InvalidJob(f"{key}: there is no file {uri}; correct the path, or put the weights there")
    return InvalidJob(f"{key}: {uri} cannot be read: {error.message}")


class _VersionedStateDict(dict[str, Any]):
    """State dict with the module versions that torch keeps beside it; some modules read old keys by their version."""

    def __init__(self, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._metadata = dict(metadata)


def _suggest_num_classes(
    shapes: Mapping[str, tuple[torch.Tensor, torch.Tensor]], takes_num_classes: bool
) -> str | None:
    """Suggest the file's number of classes if only weight and bias of one layer differ, and only in their rows."""
    counts = {(file.shape[:1], model.shape[:1]) for file, model in shapes.values()}
    only_rows_differ = all(file.shape[1:] == model.shape[1:] for file, model in shapes.values())
    if len(shapes) > 2 or len(counts) != 1 or not only_rows_differ:
        return None
    ((classes, _),) = counts
    if not classes:
        return None
    if takes_num_classes:
        return f"set model.num_classes: {classes[0]}"
    return f"build it with {classes[0]} classes: by model.arguments, or in the function that model.architecture names"


def _describe_strangers(tensors: CheckpointTensors, expected: Mapping[str, Any]) -> str:
    names = list_names(leaf.name for leaf in tensors.leaves)
    return (
        f"no key is known to the model: the file has {names}, and the model {list_names(expected)}; name the file of "
        "its weights, or correct the architecture"
    )


def _describe_differences(
    missing: list[str], unexpected: list[str], shapes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> str:
    parts = []
    if missing:
        parts.append(f"missing in the file: {list_names(missing)}")
    if unexpected:
        parts.append(f"unknown to the model: {list_names(unexpected)}")
    if shapes:
        pairs = (f"{key} {list(file.shape)} for {list(model.shape)}" for key, (file, model) in shapes.items())
        parts.append(f"of another shape (file for model): {list_names(pairs)}")
    return "; ".join(parts) or "no key is known to the model"
