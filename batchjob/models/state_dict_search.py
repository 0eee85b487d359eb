"""Search of a checkpoint for the state dict that fits a module: the dict it lies in, and the prefix of its names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.models.checkpoint_tensors import WRAPPERS, CheckpointTensors, TensorLeaf, list_names, remove_parts
from batchjob.models.state_dict_selection import StateDictSelection

__all__ = ["StateDictMatch", "find_state_dict"]

_PARALLEL_WRAPPER = "module"  # DataParallel, DistributedDataParallel
# Parts of names by which trainers call averaged weights.
_EMA = re.compile(
    r"(?:^|[._])(?:ema|swa|avg|averaged|shadow|teacher|momentum|target|encoder_k)(?:$|[._])", re.IGNORECASE
)
# Value of `model.checkpoint.key` for the outermost dict.
_OUTERMOST = "."
# torch fills these buffers itself where an old file lacks them.
_OPTIONAL = "num_batches_tracked"


@dataclass(frozen=True)
class StateDictMatch:
    """Tensors of a checkpoint whose names, behind one prefix, are those of a module.

    Attributes:
        key: Dotted path of the dict they lie in.
        strip: Prefix that is cut from their names.
        matched: Tensors by their key in the module.
        unexpected: Tensors behind the prefix that the module does not have, by name without prefix.
        missing: Keys of the module that are not there.
        misshaped: Keys of the module whose tensor has another shape here.
        is_conventional: True if earlier versions would have looked here.
        doubles: Pair of names that are one and the same key of the module; empty if there is none.
        versions: Metadata for torch, by path of a module.
        aside: Names of tensors in the same dicts that stay unused, because they are not behind the prefix.
        rivals: Values of `model.checkpoint` for the other places that fit.
    """

    key: str
    strip: str
    matched: Mapping[str, TensorLeaf]
    unexpected: Mapping[str, TensorLeaf]
    missing: tuple[str, ...]
    misshaped: tuple[str, ...]
    is_conventional: bool
    doubles: tuple[str, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    aside: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """True if each key of the module is there, in its shape."""
        return not self.misshaped and not self.doubles and all(key.endswith(_OPTIONAL) for key in self.missing)

    @property
    def is_ema(self) -> bool:
        """True if the place is named as one of averaged weights."""
        return bool(_EMA.search(f"{self.key}.{self.strip}"))

    @property
    def place(self) -> str:
        """Place in words: "under state_dict, 'model.' cut off"; empty for the outermost dict as it is."""
        cut = f"{self.strip!r} cut off" if self.strip else ""
        return ", ".join(filter(None, [f"under {self.key}" if self.key else "", cut]))

    @property
    def yaml(self) -> str:
        """Value of `model.checkpoint` that selects this place."""
        key = self.key or _OUTERMOST
        return f"{{key: {key if re.fullmatch(r'[A-Za-z_][A-Za-z0-9_.]*', key) else repr(key)}, strip: {self.strip!r}}}"

    def has_same_tensors(self, other: StateDictMatch) -> bool:
        """Return True if another place holds equal tensors for all keys."""
        import torch

        if self.matched.keys() != other.matched.keys():
            return False
        pairs = ((self.matched[key].value, other.matched[key].value) for key in self.matched)
        tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)]
        return all(a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in tensors)


def find_state_dict(
    tensors: CheckpointTensors,
    expected: Mapping[str, Any],
    selection: StateDictSelection,
    *,
    where: str,
    strict: bool = True,
    first_keys: Sequence[str] = (),
    is_ignored: Callable[[str], bool] = lambda _: False,
) -> StateDictMatch:
    """Find the one dict and prefix whose tensors fit a module.

    Example: a module with the key `fc.weight`, and a file `{"state_dict": {"model.fc.weight": …, "loss.weight": …}}`.
    The path `state_dict.model.fc.weight` ends with the key, so `state_dict.model.` is a prefix to try: the dict is
    `state_dict`, and `model.` is cut off.

    Args:
        tensors: Tensors of the file.
        expected: State dict of the module.
        selection: What the job says about the place.
        where: Start of error messages: "model.weights: x.pth does not fit net:resnet20".
        strict: False accepts a place that has some of the keys.
        first_keys: Outermost keys that win, the first of them that fits, where the job does not say which.
        is_ignored: True for names that the module need not have.

    Returns:
        The place that fits, or the nearest one.

    Raises:
        InvalidJob: Two places fit, or the one that the job names is not there.
    """
    matches = _filter(_list_matches(tensors, expected, is_ignored, ()), selection, tensors, where)
    if not any(match.is_complete for match in matches):
        # Perhaps a wrapper stands before some of the names only, or in their middle.
        unwrapped = _list_matches(tensors, expected, is_ignored, (_PARALLEL_WRAPPER,))
        complete = [match for match in unwrapped if match.is_complete]
        matches = [*matches, *(_filter(complete, selection, tensors, where) if complete else ())]
    complete = [match for match in matches if match.is_complete]
    pool = [match for match in complete if not _is_disturbed(match, complete)] or complete
    if not pool:
        most = max(len(match.matched) for match in matches)
        pool = [match for match in matches if len(match.matched) == most]
        # No place fits: the message is about the nearest, and the usual one comes first.
        if strict or any(match.is_conventional for match in pool):
            pool = _prefer_conventional(pool)[:1]
    chosen = _choose(pool, selection, first_keys, where)
    return replace(chosen, rivals=tuple(match.yaml for match in pool if match is not chosen))


def _choose(
    pool: list[StateDictMatch], selection: StateDictSelection, first_keys: Sequence[str], where: str
) -> StateDictMatch:
    if selection.prefer is None:
        for key in first_keys:
            for match in pool:
                if f"{match.key}.".startswith(f"{key}."):
                    return match
    if selection.prefer == "ema":
        pool = [match for match in pool if match.is_ema] or pool
    elif selection.prefer == "plain":
        pool = [match for match in pool if not match.is_ema] or pool
        pool = [match for match in pool if match.is_conventional] or pool
    first = _prefer_conventional(pool)[0]
    other = next((match for match in pool if match is not first and not match.has_same_tensors(first)), None)
    if other is None:
        return first
    more = f" (and {len(pool) - 2} more places)" if len(pool) > 2 else ""
    advice = f"write model.checkpoint: {first.yaml} or {other.yaml}"
    if first.is_ema != other.is_ema and selection.prefer is None:
        ema, plain = (first, other) if first.is_ema else (other, first)
        advice = f"write model.checkpoint: {{prefer: ema}} for {ema.yaml}, or {{prefer: plain}} for {plain.yaml}"
    raise InvalidJob(
        f"{where.replace('does not fit', 'fits', 1)} in two places with other weights, {first.yaml} and "
        f"{other.yaml}{more}; {advice}"
    )


def _prefer_conventional(pool: list[StateDictMatch]) -> list[StateDictMatch]:
    return sorted(pool, key=lambda match: not match.is_conventional)


def _is_disturbed(match: StateDictMatch, complete: list[StateDictMatch]) -> bool:
    """Check for names that the module does not have, but for those that are another whole state dict."""
    others = {id(leaf) for other in complete if other is not match for leaf in other.matched.values()}
    return any(id(leaf) not in others for leaf in match.unexpected.values())


def _filter(
    matches: list[StateDictMatch], selection: StateDictSelection, tensors: CheckpointTensors, where: str
) -> list[StateDictMatch]:
    """Keep the places that the job names."""
    if selection.key == _OUTERMOST:
        matches = [match for match in matches if not match.key]
    elif (key := selection.key) is not None:
        exact = [match for match in matches if match.key == key]
        matches = exact or [match for match in matches if match.key.startswith(f"{key}.")]
        if not any(f"{leaf.node}.".startswith(f"{key}.") for leaf in tensors.leaves):
            places = list_names(node or "the outermost dict" for node in tensors.list_nodes())
            raise InvalidJob(f"{where}: model.checkpoint.key: {key} holds no tensors; they are under {places}")
    if (strip := selection.strip) is not None:
        wanted = remove_parts(f"{strip.rstrip('.')}.", WRAPPERS) if strip.strip(".") else ""
        matches = [match for match in matches if match.strip == wanted]
    if not matches:
        names = list_names(dict.fromkeys(f"{leaf.name.removeprefix(f'{leaf.node}.')}" for leaf in tensors.leaves))
        told = ", ".join(f"{name}: {value!r}" for name, value in selection if value is not None)
        raise InvalidJob(
            f"{where}: model.checkpoint says {told}, where no name is one of the model's; there is {names}"
        )
    return matches


def _list_matches(
    tensors: CheckpointTensors,
    expected: Mapping[str, Any],
    is_ignored: Callable[[str], bool],
    wrappers: tuple[str, ...],
) -> list[StateDictMatch]:
    """List the places where names are keys of the module, and the usual place in any case.

    Args:
        tensors: Tensors of the file.
        expected: State dict of the module.
        is_ignored: True for names that the module need not have.
        wrappers: Further parts of names to leave out, on both sides.
    """
    keys = {remove_parts(key, (*WRAPPERS, *wrappers)): key for key in expected}
    if len(keys) < len(expected):  # Two keys of the module differ by such a part only.
        return []
    paths = [(remove_parts(leaf.path, wrappers), leaf) for leaf in tensors.leaves]
    prefixes: dict[str, dict[str, list[TensorLeaf]]] = {}
    for path, leaf in paths:
        # Example: "a.fc.weight" ends with "a.fc.weight", "fc.weight" and "weight".
        starts = [0, *(position + 1 for position, char in enumerate(path) if char == ".")]
        for start in starts:
            if path[start:] in keys:
                prefixes.setdefault(path[:start], {}).setdefault(path[start:], []).append(leaf)
    conventional = f"{tensors.conventional}." if tensors.conventional else ""
    usual = remove_parts(conventional, wrappers)
    prefixes.setdefault(usual, {})
    matches = [
        _build_match(prefix, leaves, paths, keys, expected, is_ignored, tensors) for prefix, leaves in prefixes.items()
    ]
    return [match for match in matches if match.matched or match.is_conventional]


def _build_match(
    prefix: str,
    leaves: Mapping[str, list[TensorLeaf]],
    paths: list[tuple[str, TensorLeaf]],
    keys: Mapping[str, str],
    expected: Mapping[str, Any],
    is_ignored: Callable[[str], bool],
    tensors: CheckpointTensors,
) -> StateDictMatch:
    matched = {keys[name]: same[0] for name, same in leaves.items()}
    nodes = {leaf.node for leaf in matched.values()} or {tensors.fullest_node}
    used = {id(leaf) for leaf in matched.values()}
    rest = [(path, leaf) for path, leaf in paths if leaf.node in nodes and id(leaf) not in used]
    unexpected = {
        path[len(prefix) :]: leaf
        for path, leaf in rest
        if path.startswith(prefix) and not is_ignored(path[len(prefix) :])
    }
    key = _find_common_node(nodes, prefix)
    strip = prefix[len(key) + 1 if key else 0 :]
    doubles = next((tuple(leaf.name for leaf in same[:2]) for same in leaves.values() if len(same) > 1), ())
    versions = {
        f"{path}."[len(prefix) :].removesuffix("."): entry
        for path, entry in tensors.metadata.items()
        if f"{path}.".lstrip(".").startswith(prefix)
    }
    return StateDictMatch(
        key=key,
        strip=strip,
        matched=matched,
        unexpected=unexpected,
        missing=tuple(key for key in expected if key not in matched),
        misshaped=tuple(key for key, leaf in matched.items() if not _has_loadable_shape(leaf.value, expected[key])),
        is_conventional=key == tensors.conventional and set(strip.split(".")) <= {"", _PARALLEL_WRAPPER},
        doubles=doubles,
        versions=versions,
        aside=tuple(leaf.name for path, leaf in rest if not path.startswith(prefix)),
    )


def _find_common_node(nodes: set[str], prefix: str) -> str:
    """Find the innermost dict that holds all of these, and that the prefix leads through."""
    paths = [node.split(".") if node else [] for node in nodes]
    common = paths[0]
    for path in paths[1:]:
        common = [a for a, b, same in _zip_while_equal(common, path) if same]
    while common and not prefix.startswith(f"{'.'.join(common)}."):
        common = common[:-1]
    return ".".join(common)


def _zip_while_equal(a: list[str], b: list[str]) -> Iterator[tuple[str, str, bool]]:
    for left, right in zip(a, b, strict=False):
        if left != right:
            return
        yield left, right, True


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
