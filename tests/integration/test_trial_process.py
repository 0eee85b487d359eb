"""Tuning in whole runs: trials in a process of their own, and the decision that is stored with the plan."""

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
    '''Network that misbehaves with a channels-last batch.'''

    def __init__(self, behavior):
        super().__init__()
        torch.manual_seed(0)
        self.behavior = behavior
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        if self.behavior == "fine":
            pass
        elif x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            if self.behavior == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if self.behavior == "hang":
                import time
                time.sleep(600)
            if self.behavior == "wrong":
                x = -x
            if self.behavior == "raise":
                raise RuntimeError("not like this")
        return self.head(self.norm(self.conv(x)).mean(dim=(2, 3)))


def net(behavior="fine"):
    return Net(behavior)
"""
OPEN = {"compile": "off", "precision": "fp32"}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with an empty cache, as on a new machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(12):
        pixels = noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02}.png")


def make_job(output: str, behavior: str = "fine", **runtime: Any) -> batchjob.Job:
    settings = {"pool": "local", "device": "cpu", "loader": {"processes": 0}, "tuning": "on", "batch_size": 4, **OPEN}
    return batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": "images/"},
            "model": {"type": "python", "target": "net:net", "arguments": {"behavior": behavior}},
            "preprocess": {"resize": [16, 16], "crop": None, "mean": None, "std": None},
            "task": {"type": "embedding"},
            "runtime": {**settings, **runtime},
            "output": {"uri": output},
        }
    )


def read_decision(output: str) -> dict[str, Any]:
    (file,) = Path(output, "_batchjob/plans/0000/tuning").iterdir()
    decision: dict[str, Any] = json.loads(file.read_text())
    return decision


def read_verdicts(output: str) -> dict[str, str]:
    """Return each config that was tried, with its verdict."""
    return {describe(trial["recipe"]): trial["verdict"] for trial in read_decision(output)["trials"]}


def describe(recipe: dict[str, Any]) -> str:
    return "+".join(key for key in ("channels_last", "fold") if recipe[key]) or "eager"


def embeddings(output: str) -> np.ndarray[Any, Any]:
    return np.stack(pq.read_table(f"{output}/predictions")["embedding"].to_numpy(zero_copy_only=False))


def test_trials_are_stored_with_the_plan_and_in_the_report() -> None:
    assert batchjob.run(make_job("out")).status == "complete"
    assert read_verdicts("out")["eager"] == "the reference"
    assert {verdict for words, verdict in read_verdicts("out").items() if words != "eager"} == {"passed"}
    report = json.loads(Path("out/_batchjob/report.json").read_text())
    assert report["tuning"] == [read_decision("out")]
    batchjob.run(make_job("plain", tuning="off"))
    assert read_decision("plain")["trials"] == []
    assert np.allclose(embeddings("out"), embeddings("plain"), atol=1e-5)


@pytest.mark.parametrize(
    ("behavior", "verdict"),
    [("crash", "crashed (SIGSEGV)"), ("raise", "failed: RuntimeError: not like this"), ("wrong", "deviates by")],
)
def test_failing_candidate_does_not_fail_the_job(behavior: str, verdict: str) -> None:
    assert batchjob.run(make_job("out", behavior)).status == "complete"
    lines = read_verdicts("out")
    assert verdict in lines["channels_last"]
    assert "TraceError" in lines["channels_last+fold"]
    assert not read_decision("out")["recipe"]["channels_last"]
    batchjob.run(make_job("plain", tuning="off"))
    assert np.allclose(embeddings("out"), embeddings("plain"), atol=1e-5)


def test_hanging_candidate_is_given_up_at_the_time_limit() -> None:
    assert batchjob.run(make_job("out", "hang", tuning_budget_s=10)).status == "complete"
    assert read_verdicts("out")["channels_last"] == "given up, the time was up"


def test_second_run_on_a_machine_reads_cached_trials() -> None:
    batchjob.run(make_job("out"))
    batchjob.run(make_job("again"))
    assert read_decision("again")["trials"] == read_decision("out")["trials"]
    if read_decision("again")["recipe"] != read_decision("again")["trials"][0]["recipe"]:
        assert "as this machine found before" in read_decision("again")["reason"]
    batchjob.run(make_job("other", batch_size=3))
    assert read_decision("other")["trials"] != read_decision("out")["trials"], "the batch size is part of the cache key"


def change_decision(output: str, change: dict[str, Any]) -> None:
    """Change fields of the stored decision."""
    (file,) = Path(output, "_batchjob/plans/0000/tuning").iterdir()
    file.write_text(json.dumps(read_decision(output) | change))


def test_resumed_run_reads_the_stored_decision() -> None:
    batchjob.run(make_job("out", shard_size=4))
    parts = sorted(Path("out/predictions").iterdir())
    before = embeddings("out")
    parts[1].unlink()
    Path("out/_SUCCESS").unlink()
    change_decision("out", {"recipe": read_decision("out")["recipe"] | {"fold": True}, "reason": "as we say"})
    assert batchjob.run(make_job("out", shard_size=4)).status == "complete"
    assert read_decision("out")["reason"] == "as we say"
    assert np.allclose(embeddings("out"), before, atol=1e-5)


def test_options_named_today_override_the_stored_decision(caplog: pytest.LogCaptureFixture) -> None:
    for output, runtime in (("a", {"fold": "off"}), ("b", {"tuning": "off"})):
        batchjob.run(make_job(output, shard_size=4))
        sorted(Path(f"{output}/predictions").iterdir())[1].unlink()
        Path(f"{output}/_SUCCESS").unlink()
        change_decision(output, {"recipe": read_decision(output)["recipe"] | {"fold": True, "channels_last": True}})
        caplog.clear()
        with caplog.at_level("INFO"):
            assert batchjob.run(make_job(output, shard_size=4, **runtime)).status == "complete"
        assert "as the job says by now" in caplog.text


class OperationRecorder(TorchDispatchMode):
    """Record the operations of torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def make_trial_model(**preprocess: Any) -> EngineTrialModel:
    job = make_job("out")
    if preprocess:
        job = job.model_copy(update={"preprocess": Preprocess(**preprocess)})
    sample = [str(path) for path in sorted(Path("images").iterdir())]
    return EngineTrialModel(Engine(job, Reader(job.storage), sample), sample, 4)


def test_only_the_forward_pass_is_timed() -> None:
    """Check that the batch is built and moved before: in a run that is work of the loader."""
    run = make_trial_model().build(ExecutionConfig())
    with OperationRecorder() as recorder:
        output = run()
    assert output.shape == (4, 5)
    assert any("conv" in name for name in recorder.names)
    assert not {"stack", "cat", "copy_"} & {*recorder.names}, recorder.names


def test_model_that_writes_into_its_input_gets_the_same_batch(tmp_path: Path) -> None:
    writing = NET.replace("return self.head(", "x.mul_(0.5)\n        return self.head(")
    transform = """

def prepare(image):
    from torchvision.transforms.v2.functional import resize, to_dtype
    return to_dtype(resize(image, [16, 16]), torch.float32, scale=True)
"""
    (tmp_path / "net.py").write_text(writing + transform)
    run = make_trial_model(transform="net:prepare").build(ExecutionConfig())
    np.testing.assert_array_equal(run().numpy(), run().numpy())


def test_decision_of_another_version_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    batchjob.run(make_job("out", shard_size=4))
    sorted(Path("out/predictions").iterdir())[1].unlink()
    Path("out/_SUCCESS").unlink()
    change_decision("out", {"of a later version": 1})
    assert batchjob.run(make_job("out", shard_size=4)).status == "complete"
    assert "another version's" in caplog.text


def test_decision_that_fails_here_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    batchjob.run(make_job("out", "raise", shard_size=4))
    before = embeddings("out")
    sorted(Path("out/predictions").iterdir())[1].unlink()
    Path("out/_SUCCESS").unlink()
    change_decision("out", {"recipe": read_decision("out")["recipe"] | {"channels_last": True}})
    assert batchjob.run(make_job("out", "raise", shard_size=4)).status == "complete"
    assert "fp32 channels_last fails here" in caplog.text
    assert "not like this" in caplog.text
    assert np.allclose(embeddings("out"), before, atol=1e-5)
    assert json.loads(Path("out/_batchjob/report.json").read_text())["recipes"] == {"eager fp32": 12}


def test_named_option_that_fails_is_reported_before_the_first_shard() -> None:
    with pytest.raises(InvalidJob, match=r"channels_last fails with this model on cpu: RuntimeError: not like this"):
        batchjob.run(make_job("out", "raise", channels_last="on", fold="off"))
    assert not list(Path("out/predictions").glob("*"))


def test_short_job_is_not_tuned() -> None:
    batchjob.run(make_job("out", tuning="auto"))
    assert read_decision("out")["trials"] == []
    assert read_decision("out")["reason"] == "the job is too short to try anything"
