"""Tracks of a bench's Chrome trace: times, names and lanes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from batchjob.bench.profiler_trace import ANCHOR, TRACKS, build_track_events
from batchjob.inference.predictor import PROFILER_PREFIX
from batchjob.types import StageTiming


def make_event(
    step: str, start: float, thread: int, category: str = "user_annotation", duration: float = 10.0
) -> dict[str, Any]:
    """Make an event of torch's trace; times in microseconds."""
    name = f"{PROFILER_PREFIX}{step}"
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration, "pid": 1, "tid": thread}


def make_timing(stage: str, started: float, ended: float) -> StageTiming:
    """Make a timing of this process; seconds after the anchor."""
    return StageTiming(stage, 5.0 + started, 5.0 + ended, os.getpid(), 4)


def build_tracks(
    events: Sequence[dict[str, Any]], timings: Sequence[StageTiming]
) -> dict[str, list[tuple[float, float]]]:
    """Return start and duration of the events of each track in microseconds, by its title, from top to bottom.

    The anchor is at 1000 µs of torch's clock and at 5.0 s of ours.
    """
    anchor = {**make_event("", 1000.0, 1, duration=0.0), "name": ANCHOR}
    built = list(build_track_events([anchor, *events], timings, 5.0))
    titles = {event["tid"]: event["args"]["name"] for event in built if event["name"] == "thread_name"}
    order = {event["tid"]: event["args"]["sort_index"] for event in built if event["name"] == "thread_sort_index"}
    assert set(titles) == set(order)
    return {
        titles[track]: [(event["ts"], event["dur"]) for event in built if event["ph"] == "X" and event["tid"] == track]
        for track in sorted(titles, key=order.__getitem__)
    }


def test_stage_of_any_name_has_a_track() -> None:
    timings = [make_timing("polish", 1e-3, 2e-3), make_timing("fetch", 0.0, 1e-3)]
    tracks = build_tracks([make_event("forward", 1200.0, 7)], timings)
    assert list(tracks) == ["fetch", "forward", "polish"]
    assert tracks["polish"][0] == pytest.approx((2000.0, 1000.0))
    assert "fetch" in TRACKS


def test_overlapping_batches_have_lanes_of_their_own() -> None:
    timings = [make_timing("fetch", *when) for when in ((0.0, 0.002), (0.001, 0.003), (0.002, 0.004))]
    tracks = build_tracks([], timings)
    assert [len(tracks[title]) for title in ("fetch", "fetch 2")] == [2, 1]


def test_times_of_the_gpu_are_preferred() -> None:
    on_host = [make_event(step, 1100.0 + offset, 7) for offset, step in enumerate(("H2D", "forward", "D2H"))]
    on_gpu = [
        make_event("forward", 1500.0, 20, "gpu_user_annotation", 300.0),
        make_event("H2D", 1400.0, 21, "gpu_user_annotation"),
    ]
    tracks = build_tracks([*on_host, *on_gpu], [])
    assert tracks == {"H2D": [(1400.0, 10.0)], "forward": [(1500.0, 300.0)], "D2H": [(1102.0, 10.0)]}
