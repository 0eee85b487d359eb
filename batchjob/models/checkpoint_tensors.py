"""Tensors of a checkpoint: by the nested dicts they lie in, under names without the parts that torch's wrappers add."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.text import with_article

__all__ = ["WRAPPERS", "CheckpointTensors", "TensorLeaf", "list_names", "remove_parts"]

# Keys under which most checkpoints hold the weights, the first of them that is there. Earlier versions looked
# nowhere else, so that such a place is the one whose digest is that of the file alone.
_CONVENTIONAL_KEYS = ("state_dict", "model_state_dict", "model")
# Parts of names that torch's wrappers add: torch.compile, FSDP, activation checkpointing, Lightning Fabric.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_MAX_DEPTH = 8
_MAX_LISTED = 6


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor in a checkpoint.

    Attributes:
        node: Dotted path of the dict it lies in; empty for the outermost.
        path: Dotted path of the tensor, without the parts that wrappers add.
        name: Path as the file has it, for messages.
        value: The tensor, or the extra state of a module.
    """

    node: str
    path: str
    name: str
    value: Any


@dataclass(frozen=True)
class CheckpointTensors:
    """All tensors of a checkpoint, by the dicts they lie in.

    Attributes:
        leaves: Tensors with their paths.
        metadata: Versions of modules that torch keeps beside a state dict, by the dotted path of the module.
        conventional: Dotted path of the dict that `state_dict`, `model_state_dict` or `model` lead to.
    """

    leaves: tuple[TensorLeaf, ...]
    metadata: Mapping[str, Any]
    conventional: str

    @classmethod
    def collect(cls, content: Any, where: str, rename: Callable[[str], str]) -> CheckpointTensors:
        """Collect the tensors in nested dicts.

        Args:
            content: Content of the file.
            where: Job key and file, the start of error messages.
            rename: Function from the names in the file to those of today's modules.

        Raises:
            InvalidJob: The file holds no dict, or no tensors by name.
        """
        if not isinstance(content, Mapping):
            raise InvalidJob(
                f"{where} holds {with_article(type(content).__name__)} and no state dict; save module.state_dict()"
            )
        nodes = dict(_iterate_dicts(content, "", 0, set()))
        leaves, metadata = [], {}
        for node, items in nodes.items():
            leaves += [
                TensorLeaf(node, remove_parts(rename(name), WRAPPERS), name, value)
                for key, value in items.items()
                if _is_leaf(str(key), value)
                for name in [_join(node, str(key))]
            ]
            versions = getattr(items, "_metadata", None)
            for path, entry in versions.items() if isinstance(versions, Mapping) else ():
                metadata[remove_parts(_join(node, str(path)), WRAPPERS)] = entry
        if not leaves:
            keys = list_names(f"{key} ({_name_kind(value)})" for key, value in content.items())
            raise InvalidJob(
                f"{where} holds no tensors by name, at no depth; its keys are {keys}; save tensors: "
                "torch.save(module.state_dict(), FILE)"
            )
        conventional = ""
        while key := next((key for key in _CONVENTIONAL_KEYS if _join(conventional, key) in nodes), None):
            conventional = _join(conventional, key)
        return cls(tuple(leaves), metadata, conventional)

    @property
    def fullest_node(self) -> str:
        """The conventional dict, or the one with the most tensors if it has none."""
        nodes = self.list_nodes()
        return self.conventional if self.conventional in nodes else nodes[0]

    def list_nodes(self) -> list[str]:
        """List the dicts that hold tensors, those with the most first."""
        counts: dict[str, int] = {}
        for leaf in self.leaves:
            counts[leaf.node] = counts.get(leaf.node, 0) + 1
        return sorted(counts, key=lambda node: -counts[node])


def list_names(names: Iterable[str]) -> str:
    """List the first names, and say how many more there are."""
    names = list(names)
    rest = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + rest if names else "none"


def _iterate_dicts(items: Mapping[Any, Any], path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield a dict and the dicts in it, each once, with dotted paths."""
    if id(items) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(items))
    yield path, items
    for key, value in items.items():
        if isinstance(value, Mapping):
            yield from _iterate_dicts(value, _join(path, str(key)), depth + 1, seen)


def _name_kind(value: Any) -> str:
    # Values that are not read are stand-ins of a private class.
    name = type(value).__name__
    return "no tensor" if name.startswith("_") else name


def _is_leaf(key: str, value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) or key.endswith("_extra_state")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def remove_parts(path: str, parts: tuple[str, ...]) -> str:
    """Leave parts out of a dotted path."""
    if not any(part in path for part in parts):
        return path
    return ".".join(part for part in path.split(".") if part not in parts)
