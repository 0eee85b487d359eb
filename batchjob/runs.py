"""Runs of positions in the plan."""

from __future__ import annotations

__all__ = ["meet"]


def meet(one: range, other: range) -> bool:
    """Whether a position lies in both."""
    return max(one.start, other.start) < min(one.stop, other.stop)
