"""`type: pickle`: a whole module, as `torch.save(model)` leaves it. Its classes may lie beside the job file."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchjob.errors import BatchjobError, InvalidJob
from batchjob.models.architecture import detect_input_kind, isolated_torch_state, prepare_for_inference
from batchjob.models.file_format import FileFormat
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.output_selection import select_output
from batchjob.models.trusted_file import TrustedFileModel
from batchjob.user_code import is_user_module, load_target, source_digest

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["PickleModel"]

_ADVICE = "save its state_dict and use model.type: checkpoint"


class PickleModel(TrustedFileModel):
    """A whole module in a file.

    Attributes:
        weights: what `torch.save(model)` wrote, wherever it lies; on any device when it was saved.
        main: the module beside the job file that holds the classes of the script which saved it (`__main__`).
    """

    type: Literal["pickle"] = "pickle"
    main: str | None = None
    format_name: ClassVar[str] = "a pickled module"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("module",)

    def check(self, reader: Reader, base: Path) -> None:
        """Looks without torch whether the file is there and trusted, and `main` too. Raises InvalidJob, Unavailable."""
        if self.main is not None and not is_user_module(self.main, base):
            raise InvalidJob(f"model.main: there is no module {self.main} in {base}; name the file without its '.py'")
        super().check(reader, base)

    def load(self, reader: Reader, base: Path) -> LoadedModel:
        """Unpickles the module; no preprocessing and no labels of its own.

        The digest covers the file, and the sources beside the job file that its classes come from.

        Raises:
            InvalidJob: not there, not trusted, another digest, something else in it, or a class that is not found.
            Unavailable: the store cannot be reached.
        """
        data, digest, _ = self.read_trusted(reader)
        classes = _ClassFinder(base, self.main)
        with isolated_torch_state():
            module = self._module(self._unpickled(data, classes))
            del data
            module = prepare_for_inference(module, self.where)
        if classes.used:
            sources = (source_digest(name, base) for name in sorted(classes.used))
            digest = hashlib.sha256(" ".join([digest, *sources]).encode()).hexdigest()
        return LoadedModel(select_output(module, self.output), None, None, digest, detect_input_kind(module))

    def _unpickled(self, data: bytes, classes: _ClassFinder) -> Any:
        import torch

        try:
            return torch.load(BytesIO(data), map_location="cpu", weights_only=False, pickle_module=classes.module())
        except (BatchjobError, MemoryError):
            raise
        except ModuleNotFoundError as error:
            raise InvalidJob(
                f"{self.where} names classes of the module {error.name}, which is neither beside the job file nor "
                f"installed; put it there, or {_ADVICE}"
            ) from error
        except Exception as error:  # the user's code: anything may come
            raise InvalidJob(
                f"{self.where} cannot be unpickled ({type(error).__name__}: {error}); load it with the versions it was "
                f"saved with, {_ADVICE}"
            ) from error

    def _module(self, found: Any) -> nn.Module:
        import torch

        if isinstance(found, Mapping):
            keys = ", ".join(str(key) for key in list(found)[:6])
            raise InvalidJob(f"{self.where} holds a dict ({keys}) and no module; {_ADVICE}, or save the module alone")
        if not isinstance(found, torch.nn.Module):
            raise InvalidJob(f"{self.where} holds a {type(found).__name__} and no module; write torch.save(model)")
        if isinstance(found, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            return self._module(found.module)  # the wrapper remembers GPUs of the machine it was saved on
        return found


class _ClassFinder:
    """Finds what a pickle names: beside the job file first, as it would be for a script there.

    Attributes:
        used: `module:class` of all that was found there.
    """

    def __init__(self, base: Path, main: str | None) -> None:
        self.used: set[str] = set()
        self._base, self._main = base, main

    def module(self) -> ModuleType:
        """What `torch.load` takes in place of the module `pickle`."""

        def find(module: str, name: str) -> Any:
            return self._find(module, name)

        class Unpickler(pickle.Unpickler):
            """Looks beside the job file first."""

            def find_class(self, module: str, name: str, /) -> Any:
                found = find(module, name)
                return super().find_class(module, name) if found is None else found

        class Replacement(ModuleType):
            """`pickle`, with that unpickler."""

            def __init__(self) -> None:
                super().__init__("pickle")
                self.Unpickler = Unpickler

            @staticmethod
            def load(file: Any, **options: Any) -> Any:
                return Unpickler(file, **options).load()

        return Replacement()

    def _find(self, module: str, name: str) -> Any:
        if module == "__main__":
            if self._main is None:
                raise InvalidJob(
                    f"model.weights: the pickle names {name} of the script that saved it; put that script beside the "
                    "job file and write model.main: its name without '.py'"
                )
            module = self._main
        if not is_user_module(module, self._base):
            return None
        target = f"{module}:{name}"
        found = load_target(target, self._base)
        self.used.add(target)
        return found
