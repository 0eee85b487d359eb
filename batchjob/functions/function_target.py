"""Functions and classes that a job holds in place of `module:attribute`: by the name of their module, or by value."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchjob.errors import InvalidJob, describe_error

__all__ = ["FUNCTION_KEY", "FunctionTarget", "ModuleTarget", "pickle_by_value"]

FUNCTION_KEY = "function"
"""Key of a serialized `FunctionTarget` for its name; a mapping with this key is one."""


def pickle_by_value(value: Any) -> bytes:
    """Pickle a value with the functions and classes of the script in it, for other processes."""
    import cloudpickle  # Ray brings the same package, but only with all of Ray.

    pickled: bytes = cloudpickle.dumps(value)
    return pickled


class ModuleTarget(str):
    """Text `module:attribute` of a function that was given itself, with the folder of its module.

    Attributes:
        folder: Folder in which the module was found.
    """

    __slots__ = ("folder",)
    folder: Path


class FunctionTarget(str):
    """Function, class or callable object by value. As text it is its name, such as `__main__:build`.

    Example, for `def build(): return nn.Linear(WIDTH, 2)` in a script:

        code      {"build": "1f0c…"}    sha256 of the source
        values    {"WIDTH": "3"}        what the function uses from outside

    Attributes:
        code: Start of the SHA-256 of the source of each function and class that belongs to it, by name, and of each
            module beside the script, by path.
        values: Captured values by name: globals, closures and defaults; numbers as they are, others by type and digest.
        pickled: The function itself, pickled by cloudpickle; None in a job that was read from an output.
        folder: Folder of the modules beside the script that it uses; None if there are none, or several folders.
    """

    code: Mapping[str, str]
    values: Mapping[str, str]
    pickled: bytes | None
    folder: Path | None = None

    @classmethod
    def make(
        cls, name: str, code: Mapping[str, str], values: Mapping[str, str], pickled: bytes | None
    ) -> FunctionTarget:
        """Make a target; see the attributes."""
        target = cls(name)
        target.code, target.values, target.pickled = dict(code), dict(values), pickled
        return target

    @classmethod
    def from_document(cls, document: Mapping[str, Any], functions: Mapping[str, str]) -> FunctionTarget:
        """Restore a target.

        Args:
            document: Result of `to_document`.
            functions: Pickled functions by digest, in base64.
        """
        target = cls.make(document[FUNCTION_KEY], document["code"], document["values"], None)
        if target.digest in functions:
            target.pickled = base64.b64decode(functions[target.digest])
        return target

    def to_document(self) -> dict[str, Any]:
        """Return name, code and values as JSON holds them, without the function itself."""
        return {FUNCTION_KEY: str(self), "code": dict(self.code), "values": dict(self.values)}

    @property
    def encoded(self) -> str:
        """The pickled function in base64; empty if there is none."""
        return base64.b64encode(self.pickled or b"").decode()

    @property
    def digest(self) -> str:
        """SHA-256 of the name, the code and the captured values."""
        return hashlib.sha256(json.dumps(self.to_document(), sort_keys=True).encode()).hexdigest()

    def load(self) -> Any:
        """Return the function, restored in this process.

        Raises:
            InvalidJob: It is not there, or it needs a module that is not installed here.
        """
        if self.pickled is None:
            raise InvalidJob(f"{self} is a function of the script that made this job; run that script again")
        try:
            return pickle.loads(self.pickled)  # noqa: S301 - pickled by this job's own driver
        except Exception as error:  # unpickling imports modules and runs the user's code
            raise InvalidJob(
                f"{self} cannot be loaded in a worker ({describe_error(error)}); install what it needs there, or put "
                "it into a module beside the script and import it"
            ) from error
