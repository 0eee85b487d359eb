"""Autoscaler of a cluster: the nodes that it may bring, and those it is starting. Pure: Ray's answers are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchjob.text import format_count

__all__ = ["NO_AUTOSCALER", "Autoscaler", "NodeGroup", "read_autoscaling_status"]

# Ray makes a node type of this form for each node that nobody's autoscaler has started.
_TYPE_OF_MANUAL_NODE = "node_"


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that an autoscaler may start.

    Attributes:
        gpus: GPUs of each node.
        max_nodes: Most nodes at any time; None without a limit.
    """

    gpus: float
    max_nodes: int | None = None


@dataclass(frozen=True)
class Autoscaler:
    """State of a cluster's autoscaler.

    Attributes:
        is_active: It starts nodes; False where nodes are started by hand only.
        groups: Nodes that it may start; None where Ray does not tell.
        pending: Number of nodes that are being started, by node type.
        refused: Resources of requests for which, as it says, none of its nodes is large enough.
    """

    is_active: bool
    groups: tuple[NodeGroup, ...] | None = None
    pending: tuple[tuple[str, int], ...] = ()
    refused: tuple[Mapping[str, float], ...] = ()

    def may_bring(self, gpus: float) -> bool:
        """Return True unless it is certain that no node with so many GPUs can come."""
        # A request that asks for more besides may be refused for that.
        if not self.is_active or any(dict(request) == {"GPU": gpus} for request in self.refused):
            return False
        return self.groups is None or any(group.gpus >= gpus and group.max_nodes != 0 for group in self.groups)

    def describe(self) -> str:
        """Describe the nodes that are being started, and the GPUs that may come, as the rest of a sentence."""
        if not self.is_active:
            return "no autoscaler is at work"
        pending = " and ".join(f"{format_count(count, 'node')} of type {name}" for name, count in self.pending)
        return f"its autoscaler is starting {pending or 'no node'}, {self._describe_groups()}"

    def _describe_groups(self) -> str:
        if self.groups is None:
            return "and does not tell which nodes may come"
        if any(group.max_nodes is None for group in self.groups if group.gpus):
            return "any number of GPUs may come"
        return f"at most {sum(group.gpus * (group.max_nodes or 0) for group in self.groups):g} GPUs may come"


NO_AUTOSCALER = Autoscaler(is_active=False)


def read_autoscaling_status(status: Mapping[str, Any], groups: tuple[NodeGroup, ...] | None) -> Autoscaler | None:
    """Return the autoscaler of a status that Ray's monitor has written (`__autoscaling_status`, autoscaler v1).

    None is a status of a cluster's first seconds, which tells of no nodes yet.

    Example:
        A cluster without an autoscaler has active nodes such as `{"node_7478a6…": 1}`; one with an autoscaler has the
        node types of its configuration, such as `{"head": 1}`.

    Args:
        status: The status.
        groups: Nodes that the autoscaler may start; None where Ray does not tell.
    """
    report = status.get("autoscaler_report") or {}
    pending = Counter[str](report.get("pending_launches") or {})
    pending.update(node_type for _, node_type, *_ in report.get("pending_nodes") or ())
    types = [*(report.get("active_nodes") or ()), *pending]
    if not types:
        return None
    is_active = any(not node_type.startswith(_TYPE_OF_MANUAL_NODE) for node_type in types)
    return Autoscaler(is_active, groups, tuple(sorted(pending.items()))) if is_active else NO_AUTOSCALER
