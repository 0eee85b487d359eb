"""Tuning through whole runs: candidates in a process of their own, the decision beside the plan, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import batchjob
from batchjob.errors import InvalidJob
from batchjob.inference.autotune.engine_trial import EngineTrialModel
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.reader import Reader

NET = """
import os
import signal

import torch
from torch import nn


class Net(nn.Module):
    '''Has its ways with a channels-last batch.'''

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        if self.way == "fine":
            pass
        elif x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            if self.way == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if self.way == "hang":
                import time
                time.sleep(600)
            if self.way == "wrong":
                x = -x
            if self.way == "raise":
                raise RuntimeError("not like this")
        return self.head(self.norm(self.conv(x)).mean(dim=(2, 3)))


def net(way="fine"):
    return Net(way)
"""
OPEN = {"compile": "off", "precision": "fp32"}


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that remembers nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(12):
        pixels = noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02}.png")


def job(output: str, way: str = "fine", **runtime: Any) -> batchjob.Job:
    given = {"pool": "local", "device": "cpu", "loader": {"processes": 0}, "tuning": "on", "batch_size": 4, **OPEN}
    return batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": "images/"},
            "model": {"type": "python", "target": "net:net", "arguments": {"way": way}},
            "preprocess": {"resize": [16, 16], "crop": None, "mean": None, "std": None},
            "task": {"type": "embedding"},
            "runtime": {**given, **runtime},
            "output": {"uri": output},
        }
    )


def decision(output: str) -> dict[str, Any]:
    (file,) = Path(output, "_batchjob/plans/0000/tuning").iterdir()
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def table(output: str) -> dict[str, str]:
    """What was tried, and the verdict."""
    return {_words(trial["recipe"]): trial["verdict"] for trial in decision(output)["trials"]}


def _words(recipe: dict[str, Any]) -> str:
    return "+".join(key for key in ("channels_last", "fold") if recipe[key]) or "eager"


def embeddings(output: str) -> np.ndarray[Any, Any]:
    return np.stack(pq.read_table(f"{output}/predictions")["embedding"].to_numpy(zero_copy_only=False))


def test_the_table_lies_beside_the_plan_and_in_the_report() -> None:
    assert batchjob.run(job("out")).status == "complete"
    assert table("out")["eager"] == "the reference"
    assert {verdict for words, verdict in table("out").items() if words != "eager"} == {"passed"}
    report = json.loads(Path("out/_batchjob/report.json").read_text())
    assert report["tuning"] == [decision("out")]
    batchjob.run(job("plain", tuning="off"))
    assert decision("plain")["trials"] == []
    assert np.allclose(embeddings("out"), embeddings("plain"), atol=1e-5)


@pytest.mark.parametrize(
    ("way", "said"),
    [("crash", "crashed (SIGSEGV)"), ("raise", "failed: RuntimeError: not like this"), ("wrong", "deviates by")],
)
def test_a_candidate_that_fails_is_a_line_and_not_a_failed_job(way: str, said: str) -> None:
    assert batchjob.run(job("out", way)).status == "complete"
    lines = table("out")
    assert said in lines["channels_last"]
    assert "TraceError" in lines["channels_last+fold"]
    assert not decision("out")["recipe"]["channels_last"]
    batchjob.run(job("plain", tuning="off"))
    assert np.allclose(embeddings("out"), embeddings("plain"), atol=1e-5)


def test_a_candidate_that_hangs_is_given_up_when_the_time_is_up() -> None:
    assert batchjob.run(job("out", "hang", tuning_budget_s=10)).status == "complete"
    assert table("out")["channels_last"] == "given up, the time was up"


def test_a_second_run_on_this_machine_takes_the_table_from_the_first() -> None:
    batchjob.run(job("out"))
    batchjob.run(job("again"))
    assert decision("again")["trials"] == decision("out")["trials"]
    if decision("again")["recipe"] != decision("again")["trials"][0]["recipe"]:
        assert "as this machine found before" in decision("again")["reason"]
    batchjob.run(job("other", batch_size=3))
    assert decision("other")["trials"] != decision("out")["trials"], "another batch is another matter"


def standing(output: str, change: dict[str, Any]) -> None:
    """Make the decision that stands there another one."""
    (file,) = Path(output, "_batchjob/plans/0000/tuning").iterdir()
    file.write_text(json.dumps(decision(output) | change))


def test_a_resumed_run_reads_the_decision_that_stands() -> None:
    batchjob.run(job("out", shard_size=4))
    parts = sorted(Path("out/predictions").iterdir())
    before = embeddings("out")
    parts[1].unlink()
    Path("out/_SUCCESS").unlink()
    standing("out", {"recipe": decision("out")["recipe"] | {"fold": True}, "reason": "as we say"})
    assert batchjob.run(job("out", shard_size=4)).status == "complete"
    assert decision("out")["reason"] == "as we say"
    assert np.allclose(embeddings("out"), before, atol=1e-5)


def test_what_the_job_names_by_now_is_stronger_than_the_decision_that_stands(caplog: pytest.LogCaptureFixture) -> None:
    for output, runtime in (("a", {"fold": "off"}), ("b", {"tuning": "off"})):
        batchjob.run(job(output, shard_size=4))
        sorted(Path(f"{output}/predictions").iterdir())[1].unlink()
        Path(f"{output}/_SUCCESS").unlink()
        standing(output, {"recipe": decision(output)["recipe"] | {"fold": True, "channels_last": True}})
        caplog.clear()
        with caplog.at_level("INFO"):
            assert batchjob.run(job(output, shard_size=4, **runtime)).status == "complete"
        assert "as the job says by now" in caplog.text


class Operations(TorchDispatchMode):
    """Notes what torch does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def subject(**preprocess: Any) -> EngineTrialModel:
    given = job("out")
    if preprocess:
        given = given.model_copy(update={"preprocess": Preprocess(**preprocess)})
    sample = [str(path) for path in sorted(Path("images").iterdir())]
    return EngineTrialModel(Engine(given, Reader(given.storage), sample), sample, 4)


def test_what_is_timed_is_the_forward_pass_alone() -> None:
    """The batch is made and moved before: per image, that is work which a run's loader does."""
    run = subject().build(ExecutionConfig())
    with Operations() as noted:
        output = run()
    assert output.shape == (4, 5)
    assert any("conv" in name for name in noted.names)
    assert not {"stack", "cat", "copy_"} & {*noted.names}, noted.names


def test_a_model_that_writes_into_its_input_finds_the_same_batch_again(tmp_path: Path) -> None:
    writing = NET.replace("return self.head(", "x.mul_(0.5)\n        return self.head(")
    transform = """

def prepare(image):
    from torchvision.transforms.v2.functional import resize, to_dtype
    return to_dtype(resize(image, [16, 16]), torch.float32, scale=True)
"""
    (tmp_path / "net.py").write_text(writing + transform)
    run = subject(transform="net:prepare").build(ExecutionConfig())
    np.testing.assert_array_equal(run().numpy(), run().numpy())


def test_another_versions_decision_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    batchjob.run(job("out", shard_size=4))
    sorted(Path("out/predictions").iterdir())[1].unlink()
    Path("out/_SUCCESS").unlink()
    standing("out", {"of a later version": 1})
    assert batchjob.run(job("out", shard_size=4)).status == "complete"
    assert "another version's" in caplog.text


def test_a_decision_that_fails_here_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    batchjob.run(job("out", "raise", shard_size=4))
    before = embeddings("out")
    sorted(Path("out/predictions").iterdir())[1].unlink()
    Path("out/_SUCCESS").unlink()
    standing("out", {"recipe": decision("out")["recipe"] | {"channels_last": True}})
    assert batchjob.run(job("out", "raise", shard_size=4)).status == "complete"
    assert "fp32 channels_last fails here" in caplog.text
    assert "not like this" in caplog.text
    assert np.allclose(embeddings("out"), before, atol=1e-5)
    assert json.loads(Path("out/_batchjob/report.json").read_text())["recipes"] == {"eager fp32": 12}


def test_what_the_job_names_and_the_model_refuses_is_said_before_the_first_shard() -> None:
    with pytest.raises(InvalidJob, match=r"channels_last fails with this model: RuntimeError: not like this"):
        batchjob.run(job("out", "raise", channels_last="on", fold="off"))
    assert not list(Path("out/predictions").glob("*"))


def test_a_short_job_is_not_tuned() -> None:
    batchjob.run(job("out", tuning="auto"))
    assert decision("out")["trials"] == []
    assert decision("out")["reason"] == "the job is too short to try anything"
