"""Weight files: bytes to a state dict, and the state dict into a module, with every key that does not fit named."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob, NotFound, StorageError
from batchjob.models.file_format import require_format

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["check_file_exists", "hash_state_dict", "load_weights", "parse_state_dict", "read_file"]

_log = logging.getLogger(__name__)
_NESTS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 6
_NO_CODE = (
    "no code is loaded; save its state_dict, or a .safetensors file. A whole module that torch.save(model) wrote is "
    "loaded by model.type: pickle, with model.trust: true and model.sha256"
)


def read_file(reader: Reader, uri: str, key: str) -> bytes:
    """The bytes of a file that the job names under `key`. Raises InvalidJob (not there), Unavailable."""
    try:
        data: bytes = reader.read(uri).data
    except StorageError as error:
        raise _absent(error, uri, key) from error
    return data


def check_file_exists(reader: Reader, uri: str, key: str) -> None:
    """Raises InvalidJob where the file is not there; reads none of it."""
    try:
        reader.stat(uri)
    except StorageError as error:
        raise _absent(error, uri, key) from error


def _absent(error: StorageError, uri: str, key: str) -> InvalidJob:
    if isinstance(error, NotFound):
        return InvalidJob(f"{key}: there is no file {uri}; correct the path, or put the weights there")
    return InvalidJob(f"{key}: {uri} cannot be read: {error.message}")


def parse_state_dict(data: bytes, uri: str, key: str = "model.weights") -> dict[str, torch.Tensor]:
    """The state dict in a file of torch's format or safetensors, told apart by content.

    Nested under `state_dict`, `model_state_dict` or `model` it is taken from there. Tensors are on the CPU.

    Raises:
        InvalidJob: not such a file, broken, holding code, or holding no state dict.
    """
    where = f"{key}: {uri}"
    kind = require_format(data, where, "state", "safetensors", "module", "unknown", expected="a state dict")
    content = _from_safetensors(data, where) if kind == "safetensors" else _from_torch(data, where)
    return _unnest(content, where)


def _from_safetensors(data: bytes, where: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidJob(f"{where} is no whole safetensors file ({error}); copy it there again") from error


def _from_torch(data: bytes, where: str) -> Any:
    import pickle
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            # Whatever torch warns of here either loads all the same, or is said better by the sentence below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # broken files end in nearly every exception there is
        raise InvalidJob(
            f"{where} {_diagnose(error, isinstance(error, pickle.UnpicklingError) and _is_pickle(data))}"
        ) from error


def _is_pickle(data: bytes) -> bool:
    return data.startswith((b"PK\x03\x04", b"\x80"))


def _diagnose(error: Exception, refused: bool) -> str:
    text = str(error)
    if refused:
        code = re.search(r"(?:GLOBAL|unsupported class) (\S+)", text)
        if code:
            return f"holds code ({code[1]}) beside tensors: {_NO_CODE}"
        if "Unsupported operand" in text or "Unsupported class" in text:
            return f"holds Python objects beside tensors: {_NO_CODE}"
    reason = (text.strip().splitlines() or [""])[-1][:200]
    return f"is not a weight file that torch or safetensors reads ({type(error).__name__}: {reason}); copy it again"


def _unnest(content: Any, where: str) -> dict[str, torch.Tensor]:
    import torch

    nested = content
    while isinstance(nested, Mapping):
        inner = next((nested[key] for key in _NESTS if isinstance(nested.get(key), Mapping)), None)
        if inner is None:
            break
        nested = inner
    if not isinstance(nested, Mapping):
        raise InvalidJob(f"{where} holds a {type(nested).__name__} and no state dict; save module.state_dict()")
    state = {
        str(key): value
        for key, value in nested.items()
        if isinstance(value, torch.Tensor) or str(key).endswith("_extra_state")
    }
    if not state:
        raise InvalidJob(
            f"{where} holds no tensors by name, nor under {', '.join(_NESTS)}; its keys are {_names(map(str, nested))}"
        )
    metadata = getattr(nested, "_metadata", None)
    return _Stated(state, metadata if isinstance(metadata, Mapping) else {})


class _Stated(dict[str, Any]):
    """A state dict with the module versions torch keeps beside it: some modules read old keys by them."""

    def __init__(self, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._metadata = dict(metadata)


def load_weights(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, where: str, advice: str, strict: bool = True
) -> None:
    """Copies `state` into `module`; prefixes that wrappers leave (`module.`, `_orig_mod.`) are stripped.

    Args:
        where: what does not fit what, for the sentence: "model.weights: x.pth does not fit net:resnet20".
        advice: what to change.
        strict: False lets keys be missing or left over; another shape is an error all the same.

    Raises:
        InvalidJob: missing, left-over and mis-shaped keys by name.
    """
    wanted = module.state_dict()
    renamed = _strip(state, wanted, where)
    misshaped = [key for key, value in renamed.items() if key in wanted and not _same_shape(value, wanted[key])]
    known = len(renamed.keys() & wanted.keys()) - len(misshaped)
    shapes = {key: (renamed.pop(key), wanted[key]) for key in misshaped}
    try:
        result = module.load_state_dict(renamed, strict=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InvalidJob(f"{where}: {' '.join(str(error).split())[:500]}; {advice}") from error
    missing = [key for key in result.missing_keys if key not in shapes]
    unexpected = result.unexpected_keys
    if shapes or (strict and (missing or unexpected)) or known == 0:
        hint = _class_count(shapes) if not missing and not unexpected else None
        raise InvalidJob(f"{where}: {_differences(missing, unexpected, shapes)}; {hint or advice}")
    if missing or unexpected:
        _log.warning("%s, let pass by strict: false: %s", where, _differences(missing, unexpected, {}))


def _strip(state: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> _Stated:
    names: dict[str, str] = {}
    for key in state:
        name = _fitting(key, wanted)
        if name == "n_averaged" and name not in wanted:  # torch.optim.swa_utils counts there
            continue
        if name in names:
            raise InvalidJob(f"{where}: the file holds both {names[name]} and {key}; save the state dict of one module")
        names[name] = key
    metadata = {
        _fitting(f"{path}.", wanted).removesuffix(".") if f"{path}." not in _PREFIXES else "": entry
        for path, entry in getattr(state, "_metadata", {}).items()
    }
    return _Stated({name: state[key] for name, key in names.items()}, metadata)


def _fitting(key: str, wanted: Mapping[str, Any]) -> str:
    """`key` as the module knows it: a module may well have a child named `module`, so no more is cut than needed."""
    name = key
    while name not in wanted and name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    if name not in wanted and "_orig_mod." in name:  # a compiled child
        name = name.replace("_orig_mod.", "")
    return name


def _same_shape(value: Any, target: Any) -> bool:
    import torch
    from torch.nn.parameter import is_lazy

    if not isinstance(value, torch.Tensor) or not isinstance(target, torch.Tensor):
        return True
    if is_lazy(target):
        return True
    if target.ndim == 0 and value.shape == (1,):  # scalars as torch 0.3 wrote them; torch reads them
        return True
    return value.shape == target.shape


def _class_count(shapes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """Where the last layer alone differs, in its number of rows, the file tells how many classes it knows."""
    counts = {(file.shape[:1], model.shape[:1]) for file, model in shapes.values()}
    rest = all(file.shape[1:] == model.shape[1:] for file, model in shapes.values())
    if len(shapes) > 2 or len(counts) != 1 or not rest:
        return None
    ((classes, _),) = counts
    return f"set model.num_classes: {classes[0]}" if classes else None


def _differences(
    missing: list[str], unexpected: list[str], shapes: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> str:
    parts = []
    if missing:
        parts.append(f"missing in the file: {_names(missing)}")
    if unexpected:
        parts.append(f"unknown to the model: {_names(unexpected)}")
    if shapes:
        wrong = (f"{key} {list(file.shape)} for {list(model.shape)}" for key, (file, model) in shapes.items())
        parts.append(f"of another shape (file for model): {_names(wrong)}")
    return "; ".join(parts) or "no key is known to the model"


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more if listed else "none"


def hash_state_dict(module: nn.Module) -> str:
    """Hex sha256 over names, types, shapes and values of parameters and persistent buffers."""
    import torch

    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        plain = value.int_repr() if value.is_quantized else value
        plain = plain.to_dense() if plain.layout != torch.strided else plain
        digest.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
