"""One job from images to Parquet, killed and resumed, on local disks, S3 and Ray; tests/long has the longer forms."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from batchjob_process import delete_lease
from cifar_job import cifar, footers, labels_right, rows, run, start, wait
from seaweed import Seaweed

import batchjob
from batchjob.output import commit
from batchjob.storage.store import open_store

SLOW_MODEL = """
import time, torch
class Slow(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.4)
        return x.mean(dim=(2, 3))
def build():
    return Slow()
"""
SLOW_JOB = """
input: {type: prefix, uri: %s, include: ["**/00[0-4]?.jpg"]}
model: {type: python, target: slow:build}
preprocess: {resize: null, crop: null, mean: null, std: null}
task: {type: classification}
runtime: {pool: local, shard_size: 50, batch_size: 25, tuning: "off"}
output: {uri: %s}
"""


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition that another process brings about."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def slow_job(folder: Path, data: Path, output: str) -> str:
    """A job of 500 images that takes some 8 seconds of sleep."""
    (folder / "slow.py").write_text(SLOW_MODEL)
    (folder / "job.yaml").write_text(SLOW_JOB % (data / "cifar10" / "images", output))
    return str(folder / "job.yaml")


@pytest.fixture(scope="module")
def finished(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("finished") / "out")
    ended = run(cifar(test_data, output))
    assert (ended.code, ended.answer["status"]) == (0, "complete"), ended.said
    return output


def test_every_image_has_its_row_and_the_published_share_is_right(finished: str) -> None:
    assert abs(labels_right(rows(finished)) - 804) <= 1


def test_a_finished_job_is_left_as_it_is(test_data: Path, finished: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(finished).rglob("*") if path.is_file()}
    ended = run(cifar(test_data, finished))
    assert (ended.code, ended.answer["status"], ended.answer["predicted"]) == (0, "already_complete", 1000)
    assert {path: path.stat().st_mtime_ns for path in Path(finished).rglob("*") if path.is_file()} == before


def test_another_job_is_refused_with_the_difference(test_data: Path, finished: str) -> None:
    ended = run(cifar(test_data, finished, "task.top_k=2"))
    assert ended.code == 2
    assert "task.top_k: 1 there, 2 here" in ended.said


def test_a_part_that_went_missing_is_an_alarm(test_data: Path, finished: str, tmp_path: Path) -> None:
    part = min(Path(finished, "predictions").iterdir())
    part.rename(tmp_path / part.name)
    try:
        ended = run(cifar(test_data, finished))
    finally:
        (tmp_path / part.name).rename(part)
    assert ended.code == 3
    assert part.name in ended.said


def test_common_readers_open_it_with_one_plain_call(finished: str) -> None:
    import duckdb
    import pandas
    import polars
    import pyarrow.dataset

    folder = f"{finished}/predictions"
    assert duckdb.read_parquet(f"{folder}/*.parquet").shape[0] == 1000
    assert polars.read_parquet(folder).height == 1000
    assert pyarrow.dataset.dataset(folder).count_rows() == 1000
    assert len(pandas.read_parquet(folder)) == 1000


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_killed_driver_resumes_and_redoes_nothing(
    place: str, test_data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output, images = str(tmp_path / "out"), None
    if place == "s3":
        server: Seaweed = request.getfixturevalue("s3")
        output, images = server.bucket() + "out", server.bucket() + "images"
        server.put_tree(test_data / "cifar10" / "images", images)
    arguments = cifar(test_data, output, images=images)
    store = open_store(output)
    process = start(arguments)  # killed once: tests/faults does so at every point
    while len(commit.list_parts(store)) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    wait(process)
    delete_lease(output)
    committed = {key: made.attempt for key, made in footers(output).items()}
    ended = run(arguments)
    assert (ended.code, ended.answer["planned"]) == (0, 1000), ended.said
    assert abs(labels_right(rows(output)) - 804) <= 1
    assert committed.items() <= {key: made.attempt for key, made in footers(output).items()}.items()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_dead_network_or_name_commits_nothing(endpoint: str, test_data: Path) -> None:
    ended = run(
        cifar(test_data, "s3://nowhere/out"),
        BATCHJOB_PATIENCE="2",
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
    )
    assert ended.code == 75, ended.said


def test_embeddings_are_those_of_a_plain_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from torchvision.transforms import functional

    from batchjob.user_code import load_target

    output = str(tmp_path / "out")
    ended = run(cifar(test_data, output, "task={type: embedding}", "input.include=['**/00[0-4]0.jpg']"))
    assert ended.code == 0, ended.said
    found = rows(output)
    assert len(found) == 50
    state = torch.load(test_data / "cifar10" / "resnet20-12fca82f.th", map_location="cpu")["state_dict"]
    model = load_target("net:resnet20", Path(__file__).parents[1] / "jobs" / "cifar10_resnet20")()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    model.eval()
    for row in found:
        pixels = functional.to_tensor(Image.open(row["uri"]).convert("RGB"))
        image = functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(row["embedding"]), model(image[None])[0], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_imagenet_logits_are_those_of_the_documented_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models import ResNet18_Weights, resnet18

    job = batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": str(test_data / "imagenet-sample"), "include": ["**/n0209*"]},
            "model": {"type": "torchvision", "name": "resnet18", "seed": 0},
            "task": {"type": "embedding"},
            "runtime": {"pool": "local"},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    threads = torch.get_num_threads()
    assert batchjob.run(job).status == "complete"
    assert torch.get_num_threads() == threads
    found = rows(str(tmp_path / "out"))
    assert len(found) == 12
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18().eval()
    transform = ResNet18_Weights.DEFAULT.transforms()
    for row in found:
        image = transform(decode_image(row["uri"], mode=ImageReadMode.RGB))
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(row["embedding"]), model(image[None])[0], atol=1e-3, rtol=0)


def ray_workers(driver: int) -> list[int]:
    """Process ids of the actors below a driver's Ray."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
                parents = _ancestors(int(entry.name))
            except OSError:
                continue
            if title.startswith(b"ray::RayWorker") and driver in parents:
                found.append(int(entry.name))
    return found


def _ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        found.add(pid)
    return found


def test_on_ray_a_killed_actor_and_a_killed_driver_lose_nothing(test_data: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    job = slow_job(tmp_path, test_data, output)
    store = open_store(output)
    first = start([job, "runtime.pool=ray"])
    until(lambda: len(commit.list_parts(store)) >= 1 or first.poll() is not None, 120)
    actors = ray_workers(first.pid)
    assert actors
    os.kill(actors[0], signal.SIGKILL)
    before = len(commit.list_parts(store))
    until(lambda: len(commit.list_parts(store)) >= before + 2 or first.poll() is not None, 120)
    first.send_signal(signal.SIGKILL)
    _, said = first.communicate(timeout=60)
    assert "was lost" in said
    delete_lease(output)
    committed = {key: made.attempt for key, made in footers(output).items()}
    ended = run([job, "runtime.pool=ray"])
    assert ended.code == 0, ended.said
    assert sorted(row["position"] for row in rows(output)) == list(range(500))
    assert committed.items() <= {key: made.attempt for key, made in footers(output).items()}.items()
