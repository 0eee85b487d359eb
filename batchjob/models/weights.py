"""Weight files: read one, parse its state dict, and load that into a module; every key that does not fit is named."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob, NotFound, StorageError
from batchjob.models.file_format import require_format
from batchjob.text import with_article

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["check_file_exists", "hash_state_dict", "load_weights", "parse_state_dict", "read_file"]

_log = logging.getLogger(__name__)
# Keys of a training checkpoint that hold the state dict.
_NESTING_KEYS = ("state_dict", "model_state_dict", "model")
# Key prefixes of DataParallel and DistributedDataParallel, and of torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_MAX_LISTED_KEYS = 6
_NO_CODE_ADVICE = (
    "no code is loaded; save its state_dict, or a .safetensors file. A whole module that torch.save(model) wrote is "
    "loaded by model.type: pickle, with model.trust: true and model.sha256"
)


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


def parse_state_dict(data: bytes, uri: str, key: str = "model.weights") -> dict[str, torch.Tensor]:
    """Parse the state dict in a file of torch.save or safetensors; the format is detected from the content.

    A state dict nested under `state_dict`, `model_state_dict` or `model` is taken out of there.

    Args:
        data: Content of the file.
        uri: Location of the file, for error messages.
        key: Job key that names the file, for error messages.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        InvalidJob: The file has another format, is incomplete, holds code, or holds no state dict.
    """
    where = f"{key}: {uri}"
    file_format = require_format(
        data, where, "state_dict", "safetensors", "pickled_module", "unknown", expected="a state dict"
    )
    content = _load_safetensors(data, where) if file_format == "safetensors" else _load_torch(data, where)
    return _unnest(content, where)


def load_weights(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, where: str, advice: str, strict: bool = True
) -> None:
    """Load a state dict into a module; key prefixes of wrappers (`module.`, `_orig_mod.`) are removed as needed.

    Args:
        module: Module to fill.
        state: State dict.
        where: Start of the error message: "model.weights: x.pth does not fit net:resnet20".
        advice: End of the error message: the job keys to correct.
        strict: False allows keys that only the file or only the module has; a tensor of another shape is always an
            error.

    Raises:
        InvalidJob: Keys are missing, unknown, or have tensors of another shape. The message names them.
    """
    expected = module.state_dict()
    stripped = _strip_prefixes(state, expected, where)
    misshaped = [
        key for key, value in stripped.items() if key in expected and not _has_loadable_shape(value, expected[key])
    ]
    fitting = len(stripped.keys() & expected.keys()) - len(misshaped)
    # Shapes by key: of the tensor in the file, and of the one in the module.
    shapes = {key: (stripped.pop(key), expected[key]) for key in misshaped}
    try:
        result = module.load_state_dict(stripped, strict=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InvalidJob(f"{where}: {' '.join(str(error).split())[:500]}; {advice}") from error
    missing = [key for key in result.missing_keys if key not in shapes]
    unexpected = result.unexpected_keys
    if shapes or (strict and (missing or unexpected)) or fitting == 0:
        class_hint = _suggest_num_classes(shapes) if not missing and not unexpected else None
        raise InvalidJob(f"{where}: {_describe_differences(missing, unexpected, shapes)}; {class_hint or advice}")
    if missing or unexpected:
        _log.warning("%s, let pass by strict: false: %s", where, _describe_differences(missing, unexpected, {}))


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
        return InvalidJob(f"{key}: there is no file {uri}; correct the path, or put the weights there")
    return InvalidJob(f"{key}: {uri} cannot be read: {error.message}")


def _load_safetensors(data: bytes, where: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidJob(f"{where} is no whole safetensors file ({error}); copy it there again") from error


def _load_torch(data: bytes, where: str) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            # A file with this warning either loads, or is explained better by the message below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # A broken file may raise nearly any exception.
        # Only a file that is a pickle can be refused for its code; any other bytes raise UnpicklingError, too.
        is_pickle = data.startswith((b"PK\x03\x04", b"\x80"))
        explanation = _explain_torch_error(error, isinstance(error, pickle.UnpicklingError) and is_pickle)
        raise InvalidJob(f"{where} {explanation}") from error


def _explain_torch_error(error: Exception, refused: bool) -> str:
    text = str(error)
    if refused:
        code = re.search(r"(?:GLOBAL|unsupported class) (\S+)", text)
        if code:
            return f"holds code ({code[1]}) beside tensors: {_NO_CODE_ADVICE}"
        if "Unsupported operand" in text or "Unsupported class" in text:
            return f"holds Python objects beside tensors: {_NO_CODE_ADVICE}"
    reason = (text.strip().splitlines() or [""])[-1][:200]
    return f"is not a weight file that torch or safetensors reads ({type(error).__name__}: {reason}); copy it again"


class _VersionedStateDict(dict[str, Any]):
    """State dict with the module versions that torch keeps beside it; some modules read old keys by their version."""

    def __init__(self, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._metadata = dict(metadata)


def _unnest(content: Any, where: str) -> _VersionedStateDict:
    import torch

    nested = content
    while isinstance(nested, Mapping):
        inner = next((nested[key] for key in _NESTING_KEYS if isinstance(nested.get(key), Mapping)), None)
        if inner is None:
            break
        nested = inner
    if not isinstance(nested, Mapping):
        raise InvalidJob(
            f"{where} holds {with_article(type(nested).__name__)} and no state dict; save module.state_dict()"
        )
    state = {
        str(key): value
        for key, value in nested.items()
        if isinstance(value, torch.Tensor) or str(key).endswith("_extra_state")
    }
    if not state:
        raise InvalidJob(
            f"{where} holds no tensors by name, nor under {', '.join(_NESTING_KEYS)}; "
            f"its keys are {_list_keys(map(str, nested))}"
        )
    metadata = getattr(nested, "_metadata", None)
    return _VersionedStateDict(state, metadata if isinstance(metadata, Mapping) else {})


def _strip_prefixes(state: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> _VersionedStateDict:
    file_keys: dict[str, str] = {}  # key in the file by key in the module
    for key in state:
        name = _strip_prefix(key, expected)
        if name == "n_averaged" and name not in expected:  # a counter of torch.optim.swa_utils
            continue
        if name in file_keys:
            raise InvalidJob(
                f"{where}: the file holds both {file_keys[name]} and {key}; save the state dict of one module"
            )
        file_keys[name] = key
    # Metadata has one entry for each module, by path: "module.layer1" → "layer1", and "module" → "", the root.
    metadata = {
        _strip_prefix(f"{path}.", expected).removesuffix(".") if f"{path}." not in _WRAPPER_PREFIXES else "": entry
        for path, entry in getattr(state, "_metadata", {}).items()
    }
    return _VersionedStateDict({name: state[key] for name, key in file_keys.items()}, metadata)


def _strip_prefix(key: str, expected: Mapping[str, Any]) -> str:
    """Strip wrapper prefixes from a key until the module has it, and no further.

    The module may have a child that is called `module`. Example: "module._orig_mod.fc.weight" → "fc.weight", but
    "module.module.weight" → "module.weight" if the module has that key.
    """
    name = key
    while name not in expected and name.startswith(_WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    if name not in expected and "_orig_mod." in name:  # a child that was compiled
        name = name.replace("_orig_mod.", "")
    return name


def _has_loadable_shape(value: Any, target: Any) -> bool:
    import torch
    from torch.nn.parameter import is_lazy

    if not isinstance(value, torch.Tensor) or not isinstance(target, torch.Tensor):
        return True
    if is_lazy(target):
        return True
    if target.ndim == 0 and value.shape == (1,):  # torch 0.3 wrote scalars so, and torch still loads them
        return True
    return value.shape == target.shape


def _suggest_num_classes(shapes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """Suggest the file's number of classes if only weight and bias of one layer differ, and only in their rows."""
    counts = {(file.shape[:1], model.shape[:1]) for file, model in shapes.values()}
    only_rows_differ = all(file.shape[1:] == model.shape[1:] for file, model in shapes.values())
    if len(shapes) > 2 or len(counts) != 1 or not only_rows_differ:
        return None
    ((classes, _),) = counts
    return f"set model.num_classes: {classes[0]}" if classes else None


def _describe_differences(
    missing: list[str], unexpected: list[str], shapes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> str:
    parts = []
    if missing:
        parts.append(f"missing in the file: {_list_keys(missing)}")
    if unexpected:
        parts.append(f"unknown to the model: {_list_keys(unexpected)}")
    if shapes:
        pairs = (f"{key} {list(file.shape)} for {list(model.shape)}" for key, (file, model) in shapes.items())
        parts.append(f"of another shape (file for model): {_list_keys(pairs)}")
    return "; ".join(parts) or "no key is known to the model"


def _list_keys(keys: Iterable[str]) -> str:
    keys = list(keys)
    rest = f" and {len(keys) - _MAX_LISTED_KEYS} more" if len(keys) > _MAX_LISTED_KEYS else ""
    return ", ".join(keys[:_MAX_LISTED_KEYS]) + rest if keys else "none"
