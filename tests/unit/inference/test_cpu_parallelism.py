"""Parallel batches on a CPU: their number, detection of stateful modules, and equal rows in a run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import batchjob
from batchjob.inference.cpu_parallelism import CpuParallelism, choose_cpu_parallelism, is_stateful

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, stateful):
        super().__init__()
        self.stateful = stateful
        self.layer = torch.nn.Linear(3 * 8 * 8, 4)

    def forward(self, pixels):
        if self.stateful:
            self.last = pixels
            pixels = self.last
        return self.layer(pixels.flatten(1))

def net(stateful):
    torch.manual_seed(0)
    return Net(stateful).eval()
"""


class InputKeepingNet(nn.Module):
    """Network that keeps its last input, as models with a cache of positions do."""

    last: torch.Tensor | None = None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.last = pixels
        return self.last * 2


class CallCountingNet(nn.Module):
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return pixels


class CachingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, torch.Tensor] = {}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes[len(pixels)] = pixels
        return pixels


class Notebook:
    last: torch.Tensor | None = None


class NotebookNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.notes = Notebook()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.notes.last = pixels
        return pixels


def make_hooked_net() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].register_forward_hook(lambda *_: None)
    return module


def make_stateless_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Dropout()).eval()


@pytest.mark.parametrize(
    ("module", "stateful"),
    [
        (make_stateless_net(), False),
        (InputKeepingNet(), True),
        (CallCountingNet(), True),
        (CachingNet(), True),
        (NotebookNet(), True),
        (make_hooked_net(), True),
    ],
)
def test_module_that_writes_to_itself_is_stateful(module: nn.Module, stateful: bool) -> None:
    with torch.inference_mode():
        assert is_stateful(module, lambda: module(torch.rand(2, 3))) is stateful


def test_cpu_computes_one_batch_per_core_and_gpu_one_batch() -> None:
    assert choose_cpu_parallelism("cpu", 2) == CpuParallelism(2, 1)
    assert choose_cpu_parallelism("cpu", 1) == CpuParallelism(1, 1)
    assert choose_cpu_parallelism("cpu", 64) == CpuParallelism(16, 4), "each holds a batch in memory"
    assert choose_cpu_parallelism("cpu", 8, memory=4 << 30) == CpuParallelism(2, 4)
    assert choose_cpu_parallelism("cpu", 8, sequential=True) == CpuParallelism(1, 8)
    assert choose_cpu_parallelism("cuda", 8) == CpuParallelism(1, 8)


def make_job(output: str, cores: int, *, stateful: bool = False) -> batchjob.Job:
    return batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": "images/"},
            "model": {"type": "python", "target": "net:net", "arguments": {"stateful": stateful}},
            "preprocess": {"resize": [8, 8], "crop": None, "mean": None, "std": None},
            "task": {"type": "embedding"},
            "runtime": {
                "pool": "local",
                "device": "cpu",
                "cpus_per_worker": cores,
                "loader": {"processes": 0},
                "batch_size": 3,
                "shard_size": 10,
                "tuning": "off",
            },
            "errors": {"max_rate": 1},
            "output": {"uri": output},
        }
    )


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(41):
        if number % 9 == 4:
            Path(f"images/{number:02}.png").write_bytes(b"no image")
        else:
            pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"images/{number:02}.png")


def read_rows(output: str) -> list[dict[str, Any]]:
    table = pq.read_table(f"{output}/predictions").sort_by("position")
    rows: list[dict[str, Any]] = table.drop_columns(["run_id"]).to_pylist()
    return rows


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.usefixtures("images")
def test_parallel_batches_give_the_rows_of_sequential_ones(stateful: bool) -> None:
    threads = torch.get_num_threads()
    for output, cores in (("one", 1), ("four", 4)):
        assert batchjob.run(make_job(output, cores, stateful=stateful)).failed == 5
    assert read_rows("one") == read_rows("four")
    assert torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if thread.name == "worker"]
