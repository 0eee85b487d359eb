"""Comparison of systems over eight tiny images, the figures computed from its runs, and the delaying proxy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.delaying_proxy import delaying_proxy
from benchmarks.result_table import format_table
from benchmarks.system_run import SystemRun, steady_throughput

ROOT = Path(__file__).parents[2]


def test_two_systems_are_compared_over_eight_images(tmp_path: Path) -> None:
    data, work = tmp_path / "data", tmp_path / "work"
    (data / "imagenet-sample").mkdir(parents=True)
    (data / "cifar10" / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    for number in range(8):
        image = Image.fromarray(pixels[number]).resize((32, 32))
        image.save(data / "cifar10" / "images" / f"{number}.jpg")
    words = ["--cases", "small", "--images", "8", "--rounds", "1", "--systems", "plain_loop,batchjob_local", "--work"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *words, str(work)],
        cwd=ROOT,
        env={**os.environ, "BATCHJOB_TEST_DATA": str(data)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    assert "small: 8 images of small, mobilenet, batches of 32, 1 rounds" in ended.stdout
    assert "100.00%" in ended.stdout
    runs = [json.loads(line) for line in (work / "runs.jsonl").read_text().splitlines()]
    assert [(run["when"], run["system"]) for run in runs] == [
        ("cold", "batchjob_local"),
        ("learning", "batchjob_local"),
        ("round 1", "plain_loop"),
        ("round 1", "batchjob_local"),
    ]
    assert all(run["labels"] == run["images"] == 8 and run["seconds"] > 0 and run["peak"] > 0 for run in runs)
    assert all(run["steady"] is None for run in runs), "eight images have no pace"


def test_steady_throughput_leaves_out_the_first_and_the_last_tenth(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    lines = [f"{10 + n * 0.5} 10" for n in range(10)]  # 20 images/s
    marks.write_text("\n".join([*lines[5:], *lines[:5]]) + "\n")
    assert steady_throughput(marks, 100) == pytest.approx(20)
    marks.write_text("3.0 10\n900.0 80\n901.0 10\n")
    assert math.isnan(steady_throughput(marks, 100)), "two points tell no pace"


def test_ratios_pair_runs_of_one_round_and_a_failed_run_has_none() -> None:
    def run(system: str, seconds: float, steady: float, trouble: str = "") -> SystemRun:
        return SystemRun(system, seconds, steady, 1, {} if trouble else {"a": 1, "b": 2}, trouble)

    rounds = [
        [run("plain_loop", 10, 100), run("daft_udf", 9, 90, "exit 1"), run("batchjob_local", 5, 300)],
        [run("plain_loop", 40, 25), run("daft_udf", 9, 90, "exit 1"), run("batchjob_local", 10, 100)],
    ]
    lines = format_table("title", rounds, [], "plain_loop").splitlines()
    plain, daft, ours = ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[2:])
    assert plain[-2:] == ["3.50 (3.00–4.00)", "3.00 (2.00–4.00)"]
    assert "FAILED" in daft
    assert daft[-2:] == ["not measured", "not measured"]
    assert "100.00%" in ours


def test_delaying_proxy_delays_an_answer_and_does_not_change_it() -> None:
    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    body = bytes(range(256)) * 4096  # a megabyte, in more than one chunk
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with delaying_proxy(f"http://127.0.0.1:{server.server_port}", 0.2) as endpoint:
                began = time.monotonic()
                with urllib.request.urlopen(urllib.request.Request(endpoint, body), timeout=30) as answer:
                    assert answer.read() == body
                assert time.monotonic() - began >= 0.2
        finally:
            server.shutdown()
            thread.join()
