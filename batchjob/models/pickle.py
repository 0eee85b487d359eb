"""`type: pickle`: a whole module saved by `torch.save(model)`. Its classes may be beside the job file."""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchjob.errors import BatchjobError, InvalidJob
from batchjob.models.file_format import FileFormat
from batchjob.models.loaded_model import LoadedModel, detect_input_kind, isolated_torch_state, prepare_for_inference
from batchjob.models.output_selection import select_output
from batchjob.models.trusted_file import TrustedFileModel
from batchjob.text import with_article
from batchjob.user_code import is_user_module, list_sources, load_target, source_digest

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["PickleModel"]

_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_ADVICE = "save its state_dict and use model.type: checkpoint"


class PickleModel(TrustedFileModel):
    """Whole module in a file.

    Attributes:
        weights: Local path or URI of the file saved by `torch.save(model)`; it may have been saved on any device.
        main: Module beside the job file with the classes of the script that saved the file (its `__main__`); null if
            the classes were in modules of their own.
    """

    type: Literal["pickle"] = "pickle"
    main: str | None = None
    format_name: ClassVar[str] = "a pickled module"
    accepted_formats: ClassVar[tuple[FileFormat, ...]] = ("pickled_module",)

    def check(self, reader: Reader, folder: Path) -> None:
        """Check, without torch, that the file exists and is trusted, and that the module `main` exists.

        Raises:
            InvalidJob: The file does not exist or is not trusted, or there is no module `main`.
            Unavailable: The store cannot be reached.
        """
        if self.main is not None and not is_user_module(self.main, folder):
            raise InvalidJob(f"model.main: there is no module {self.main} in {folder}; name the file without its '.py'")
        super().check(reader, folder)

    def list_files(self, reader: Reader, folder: Path) -> list[str]:
        """Return the URIs of the weights and of the sources beside the job file that the pickle names."""
        modules = {self.main} if self.main is not None else set()
        modules |= {name for name in _list_pickled_names(reader, self.weights) if is_user_module(name, folder)}
        sources = {str(path) for module in modules for path in list_sources(module, folder)}
        return [*super().list_files(reader, folder), *sorted(sources)]

    def load(self, reader: Reader, folder: Path) -> LoadedModel:
        """Unpickle the module. It brings neither preprocessing nor labels.

        The digest covers the file and the sources beside the job file that define its classes.

        Raises:
            InvalidJob: The file does not exist, is not trusted, has another digest, holds something else, or names a
                class that is not found.
            Unavailable: The store cannot be reached.
        """
        data, digest, _ = self.read_trusted(reader)
        classes = _ClassFinder(folder, self.main)
        with isolated_torch_state():
            module = self._unwrap_module(self._unpickle(data, classes))
            del data
            module = prepare_for_inference(module, self.where)
        if classes.user_targets:
            sources = (source_digest(target, folder) for target in sorted(classes.user_targets))
            digest = hashlib.sha256(" ".join([digest, *sources]).encode()).hexdigest()
        return LoadedModel(
            select_output(module, self.output),
            preprocess=None,
            labels=None,
            digest=digest,
            input_kind=detect_input_kind(module),
        )

    def _unpickle(self, data: bytes, classes: _ClassFinder) -> Any:
        import torch

        pickle_module = classes.make_pickle_module()
        try:
            return torch.load(BytesIO(data), map_location="cpu", weights_only=False, pickle_module=pickle_module)
        except (BatchjobError, MemoryError):
            raise
        except ModuleNotFoundError as error:
            raise InvalidJob(
                f"{self.where} names classes of the module {error.name}, which is neither beside the job file nor "
                f"installed; put it there, or {_ADVICE}"
            ) from error
        except Exception as error:  # The user's code may raise anything.
            raise InvalidJob(
                f"{self.where} cannot be unpickled ({type(error).__name__}: {error}); load it with the versions it was "
                f"saved with, {_ADVICE}"
            ) from error

    def _unwrap_module(self, content: Any) -> nn.Module:
        import torch

        if isinstance(content, Mapping):
            keys = ", ".join(str(key) for key in list(content)[:6])
            raise InvalidJob(f"{self.where} holds a dict ({keys}) and no module; {_ADVICE}, or save the module alone")
        if not isinstance(content, torch.nn.Module):
            raise InvalidJob(
                f"{self.where} holds {with_article(type(content).__name__)} and no module; write torch.save(model)"
            )
        if isinstance(content, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            # The wrapper stores GPU indices of the machine it was saved on.
            return self._unwrap_module(content.module)
        return content


def _list_pickled_names(reader: Reader, uri: str) -> set[str]:
    """Return the modules that a file of torch.save names, and other words in its pickle; nothing is unpickled."""
    try:
        with reader.open(uri) as file, zipfile.ZipFile(file) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError):
        return set()  # The format of torch before 1.6, or a damaged file.
    words: set[str] = set()
    # A damaged pickle is reported where it is loaded.
    with suppress(ValueError, IndexError, UnicodeDecodeError):
        for _, argument, _ in chain.from_iterable(map(pickletools.genops, pickles)):
            if isinstance(argument, str):
                words.add(argument.partition(" ")[0])  # The argument of an opcode GLOBAL is `module class`.
    return set(filter(_MODULE_NAME.fullmatch, words))


class _ClassFinder:
    """Finder of the classes that a pickle names: first beside the job file, as for a script in that folder.

    Args:
        folder: Folder of the job file.
        main: Module there that stands for `__main__`; None if there is none.

    Attributes:
        user_targets: Classes found beside the job file so far, as `module:class`.
    """

    def __init__(self, folder: Path, main: str | None) -> None:
        self.user_targets: set[str] = set()
        self._folder, self._main = folder, main

    def make_pickle_module(self) -> ModuleType:
        """Make the argument `pickle_module` of `torch.load`: a module with an `Unpickler` that uses this finder."""

        def find_user_class(module: str, name: str) -> Any:
            return self._find_user_class(module, name)

        class ClassFindingUnpickler(pickle.Unpickler):
            """Unpickler that looks for classes beside the job file first."""

            def find_class(self, module: str, name: str, /) -> Any:
                user_class = find_user_class(module, name)
                return super().find_class(module, name) if user_class is None else user_class

        class PickleModule(ModuleType):
            """Replacement of the module `pickle`, as far as `torch.load` uses it."""

            def __init__(self) -> None:
                super().__init__("pickle")
                self.Unpickler = ClassFindingUnpickler

            @staticmethod
            def load(file: Any, **options: Any) -> Any:
                return ClassFindingUnpickler(file, **options).load()

        return PickleModule()

    def _find_user_class(self, module: str, name: str) -> Any:
        if module == "__main__":
            if self._main is None:
                raise InvalidJob(
                    f"model.weights: the pickle names {name} of the script that saved it; put that script beside the "
                    "job file and write model.main: its name without '.py'"
                )
            module = self._main
        if not is_user_module(module, self._folder):
            return None
        target = f"{module}:{name}"
        user_class = load_target(target, self._folder)
        self.user_targets.add(target)
        return user_class
