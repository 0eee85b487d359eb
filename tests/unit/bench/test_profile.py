"""Tracks of a bench's Chrome trace: times, names and processes."""

from __future__ import annotations

import os

import pytest

from batchjob.bench.profile import build_track_events
from batchjob.types import StageTiming


def test_each_timing_is_a_span_of_its_stage_and_process() -> None:
    # `time.perf_counter` of 5.001 s is at 2000 µs of the trace.
    timings = [StageTiming("fetch", 5.001, 5.003, 7, 4), StageTiming("fetch", 5.002, 5.004, 7, 4)]
    timings.append(StageTiming("write", 5.004, 5.005, os.getpid(), 8))
    events = list(build_track_events(timings, -4_999_000.0))
    spans: dict[int, dict[str, float]] = {}
    for event in events:
        if event["ph"] in {"b", "e"}:
            spans.setdefault(event["id"], {})[event["ph"]] = event["ts"]
            assert event["cat"] == "batchjob"
    assert [(span["b"], span["e"]) for span in spans.values()] == [
        pytest.approx((2000.0, 4000.0)),
        pytest.approx((3000.0, 5000.0)),
        pytest.approx((5000.0, 6000.0)),
    ]
    assert {(event["name"], event["pid"]) for event in events if event["ph"] == "b"} == {
        ("fetch", 7),
        ("write", os.getpid()),
    }
    titles = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert titles == {7: "batchjob loader 7", os.getpid(): "batchjob"}
