"""Contents of weight files by torch.save and safetensors: tensors in nested dicts. No code of the file is run."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, Self

from batchjob.errors import InvalidJob
from batchjob.models.file_format import is_tensor_global, list_pickled_globals, require_format

__all__ = ["read_checkpoint"]

# Types that training scripts save beside tensors. They only hold data, and nothing of it is used: in their place an
# `_OpaqueValue` is made, or an empty dict or list, so that not even their constructors run.
_OPAQUE_TYPES = re.compile(
    r"argparse\.Namespace"
    r"|types\.SimpleNamespace"
    r"|pathlib(\._local)?\.((Pure)?(Posix|Windows)?Path|PurePath)"
    r"|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|zoneinfo\.ZoneInfo(\._unpickle)?"
    r"|uuid\.(UUID|SafeUUID)"
    r"|decimal\.Decimal|fractions\.Fraction"
    r"|numpy\.(ndarray|dtype|bool_?|u?int(8|16|32|64|p|c)|(float|complex)\d+|str_|bytes_|void|longlong|datetime64)"
    r"|numpy\.dtypes\.\w+"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
    r"|numpy\.(core|_core)\.numeric\._frombuffer"
    r"|omegaconf\.(base|dictconfig|listconfig|nodes|basecontainer)\.\w+"
    r"|ml_collections\.[\w.]*\.(Frozen)?ConfigDict"
    r"|mmengine\.logging\.history_buffer\.HistoryBuffer"
    r"|typing\.(Any|Union|Optional|List|Dict|Tuple)"
    r"|builtins\.(bool|bytes|dict|float|frozenset|int|list|object|range|slice|str|tuple|type)"
    r"|torch\.torch_version\.TorchVersion"
)
# Types of containers that may hold the tensors themselves.
_DICT_TYPES = re.compile(
    r"collections\.defaultdict"
    r"|(pytorch_)?lightning[\w.]*\.AttributeDict"
    r"|easydict\.EasyDict|addict\.addict\.Dict|munch\.Munch"
    r"|(yacs|fvcore|detectron2)\.[\w.]*\.CfgNode"
    r"|(mmcv|mmengine)\.[\w.]*\.ConfigDict"
)
_LIST_TYPES = re.compile(r"collections\.deque")
_MAX_NAMED_TYPES = 3


class _OpaqueValue:
    """Stand-in for a value that is not used: it takes any arguments and any state, and keeps neither."""

    __slots__ = ()

    def __new__(cls, *_arguments: Any, **_keywords: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        """Drop the state."""


class _PlainDict:
    """Stand-in for subclasses of dict: making one gives an empty dict, whose items the unpickler then sets."""

    def __new__(cls, *_arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()  # torch's unpickler sets items and attributes of no other type.


class _PlainList:
    """Stand-in for sequences: making one gives an empty list, to which the unpickler then appends."""

    def __new__(cls, *_arguments: Any) -> list[Any]:  # type: ignore[misc]
        return []


def read_checkpoint(data: bytes, where: str) -> Any:
    """Read a file by torch.save or safetensors; the format is detected from the content.

    Args:
        data: Content of the file.
        where: Job key and file, the start of error messages: "model.weights: net.pth".

    Returns:
        Whatever was saved, usually nested dicts, with tensors on the CPU. Values of types that are not tensors, numbers
        or text are stand-ins without content.

    Raises:
        InvalidJob: The file has another format, is incomplete, or names types that are not known to hold only data.
    """
    file_format = require_format(
        data, where, "state_dict", "safetensors", "pickled_module", "unknown", expected="a state dict"
    )
    return _load_safetensors(data, where) if file_format == "safetensors" else _load_torch(data, where)


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
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(_list_stand_ins(data))):
            # A file with this warning either loads, or is explained better by the message below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # A broken file may raise nearly any exception.
        # Only a file that is a pickle can be refused for its code; any other bytes raise UnpicklingError, too.
        is_pickle = data.startswith((b"PK\x03\x04", b"\x80"))
        refused = isinstance(error, pickle.UnpicklingError) and is_pickle
        raise InvalidJob(f"{where} {_explain_torch_error(error, data, refused)}") from error


def _list_stand_ins(data: bytes) -> Iterator[tuple[Callable[..., Any], str]]:
    """Yield the stand-ins for the harmless types that a file names, as `torch.serialization.safe_globals` takes them.

    torch looks at its own list first, so that none of them replaces a type that it knows.
    """
    for name in sorted(list_pickled_globals(data)):
        for pattern, stand_in in ((_OPAQUE_TYPES, _OpaqueValue), (_DICT_TYPES, _PlainDict), (_LIST_TYPES, _PlainList)):
            if pattern.fullmatch(name):
                yield stand_in, name


def _explain_torch_error(error: Exception, data: bytes, refused: bool) -> str:
    text = str(error)
    if refused:
        names = _list_refused_types(data, text)
        shown = ", ".join(names[:_MAX_NAMED_TYPES])
        shown += f" and {len(names) - _MAX_NAMED_TYPES} more" if len(names) > _MAX_NAMED_TYPES else ""
        if any(name.startswith("torch.nn.modules.") for name in names):
            return (
                f"holds a whole module ({shown}) and no state dict, and no code is loaded; save its "
                "state_dict, or load it by model.type: pickle, with model.trust: true and model.sha256"
            )
        if names or "Unsupported" in text or "Can only" in text:
            what = f"code ({shown})" if names else "Python objects"
            return (
                f"holds {what} beside tensors: no code is loaded. If you trust its author, write the tensors to a file "
                "of their own: file = torch.load(FILE, map_location='cpu', weights_only=False); "
                "torch.save(file['state_dict'], NEW) (or the key that holds them). A whole module that "
                "torch.save(model) wrote is loaded by model.type: pickle, with model.trust: true and model.sha256"
            )
    reason = (text.strip().splitlines() or [""])[-1][:200]
    return f"is not a weight file that torch or safetensors reads ({type(error).__name__}: {reason}); copy it again"


def _list_refused_types(data: bytes, text: str) -> list[str]:
    """List the types that torch refuses, the one that it stopped at first."""
    stopped_at = re.search(r"(?:GLOBAL|unsupported class) (\S+)", text)
    if stopped_at is None:
        return []
    first = stopped_at[1]
    harmless = {name for _, name in _list_stand_ins(data)}
    others = [
        name
        for name in sorted(list_pickled_globals(data) - harmless)
        if name.removeprefix("builtins.") != first and not is_tensor_global(name)
    ]
    return [first, *others]
