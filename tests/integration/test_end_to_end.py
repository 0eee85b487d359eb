"""Jobs from images to Parquet, killed and resumed, on a local disk, S3 and Ray; tests/slow has longer ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import batchjob
from batchjob.output import commit
from tests.support.batchjob_process import (
    cifar_arguments,
    count_correct_labels,
    delete_lease,
    find_actors,
    kill,
    kill_on_exit,
    open_output,
    read_all_footers,
    read_rows,
    run_batchjob,
    start_batchjob,
    wait_until,
)
from tests.support.seaweed import Seaweed

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


def four_shards(data: Path, output: str, *more: str) -> list[str]:
    """Return arguments of `run` for the CIFAR job in four shards."""
    return cifar_arguments(data, output, "runtime.device=auto", "runtime.shard_size=250", *more)


def write_slow_cifar_job(folder: Path, data: Path, output: str) -> str:
    """Write a job of 500 images that sleeps for some 8 seconds; return the path of its file."""
    (folder / "slow.py").write_text(SLOW_MODEL)
    (folder / "job.yaml").write_text(SLOW_JOB % (data / "cifar10" / "images", output))
    return str(folder / "job.yaml")


def count_parts(output: str) -> int:
    return len(commit.list_parts(open_output(output)))


def read_attempts(output: str) -> dict[str, str]:
    """Return the attempt that made each committed part."""
    return {key: footer.attempt for key, footer in read_all_footers(output).items()}


def list_mtimes(output: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(output).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Output of a finished CIFAR job."""
    output = str(tmp_path_factory.mktemp("finished") / "out")
    run = run_batchjob(*four_shards(test_data, output))
    assert (run.exit_code, run.json_result["status"]) == (0, "complete"), run.stderr
    return output


def test_each_image_has_one_row_and_the_published_accuracy_is_reached(finished: str) -> None:
    assert abs(count_correct_labels(read_rows(finished)) - 804) <= 1


def test_finished_output_is_left_unchanged(test_data: Path, finished: str) -> None:
    before = list_mtimes(finished)
    run = run_batchjob(*four_shards(test_data, finished))
    assert (run.exit_code, run.json_result["status"], run.json_result["predicted"]) == (0, "already_complete", 1000)
    assert list_mtimes(finished) == before


def test_another_job_is_refused_with_the_difference(test_data: Path, finished: str) -> None:
    run = run_batchjob(*four_shards(test_data, finished, "task.top_k=2"))
    assert run.exit_code == 2
    assert "task.top_k: 1 there, 2 here" in run.stderr


def test_missing_part_of_a_finished_output_is_exit_code_3(test_data: Path, finished: str, tmp_path: Path) -> None:
    part = min(Path(finished, "predictions").iterdir())
    part.rename(tmp_path / part.name)
    try:
        run = run_batchjob(*four_shards(test_data, finished))
    finally:
        (tmp_path / part.name).rename(part)
    assert run.exit_code == 3
    assert part.name in run.stderr


def test_common_readers_open_the_predictions_in_one_call(finished: str) -> None:
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
def test_resume_after_a_killed_driver_repeats_no_committed_part(
    place: str, test_data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output, arguments = str(tmp_path / "out"), []
    if place == "s3":
        server: Seaweed = request.getfixturevalue("s3")
        output, images = server.bucket() + "out", server.bucket() + "images"
        server.put_tree(test_data / "cifar10" / "images", images)
        arguments = [f"input.uri={images}/"]
    arguments = four_shards(test_data, output, *arguments)
    with kill_on_exit(start_batchjob(*arguments)) as driver:  # killed once; tests/faults kill at every point
        wait_until(lambda: count_parts(output) >= 2 or driver.process.poll() is not None)
        kill(driver)
    delete_lease(output)
    committed = read_attempts(output)
    run = run_batchjob(*arguments)
    assert (run.exit_code, run.json_result["planned"]) == (0, 1000), run.stderr
    assert abs(count_correct_labels(read_rows(output)) - 804) <= 1
    assert committed.items() <= read_attempts(output).items()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_unreachable_endpoint_is_exit_code_75(endpoint: str, test_data: Path) -> None:
    env = {
        "BATCHJOB_PATIENCE": "2",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    run = run_batchjob(*four_shards(test_data, "s3://nowhere/out"), env=env)
    assert run.exit_code == 75, run.stderr


def test_embeddings_equal_those_of_a_plain_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from torchvision.transforms import functional

    from batchjob.user_code import load_target

    output = str(tmp_path / "out")
    settings = ["task={type: embedding}", "input.include=['**/00[0-4]0.jpg']"]
    run = run_batchjob(*four_shards(test_data, output, *settings))
    assert run.exit_code == 0, run.stderr
    rows = read_rows(output).to_pylist()
    assert len(rows) == 50
    state = torch.load(test_data / "cifar10" / "resnet20-12fca82f.th", map_location="cpu")["state_dict"]
    model = load_target("net:resnet20", Path(__file__).parents[2] / "jobs" / "cifar10_resnet20")()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    model.eval()
    for row in rows:
        pixels = functional.to_tensor(Image.open(row["uri"]).convert("RGB"))
        image = functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(row["embedding"]), model(image[None])[0], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_imagenet_logits_equal_those_of_the_documented_loop(test_data: Path, tmp_path: Path) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.models import ResNet18_Weights, resnet18

    job = batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": str(test_data / "imagenet-sample"), "include": ["**/n0209*"]},
            "model": {"type": "torchvision", "name": "resnet18", "seed": 0},
            "task": {"type": "embedding", "layer": "output"},
            "runtime": {"pool": "local"},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    threads = torch.get_num_threads()
    assert batchjob.run(job).status == "complete"
    assert torch.get_num_threads() == threads
    rows = read_rows(tmp_path / "out").to_pylist()
    assert len(rows) == 12
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18().eval()
    transform = ResNet18_Weights.DEFAULT.transforms()
    for row in rows:
        image = transform(decode_image(row["uri"], mode=ImageReadMode.RGB))
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(row["embedding"]), model(image[None])[0], atol=1e-3, rtol=0)


def test_run_on_ray_survives_a_killed_actor_and_a_killed_driver(
    test_data: Path, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    output = str(tmp_path / "out")
    job = write_slow_cifar_job(tmp_path, test_data, output)
    command = ["run", job, "--json", "runtime.pool=ray"]
    with kill_on_exit(start_batchjob(*command, env=ray_environment)) as first:
        wait_until(lambda: count_parts(output) >= 1 or first.process.poll() is not None)
        actors = find_actors(first)
        assert actors
        os.kill(min(actors)[0], signal.SIGKILL)
        before = count_parts(output)
        wait_until(lambda: count_parts(output) >= before + 2 or first.process.poll() is not None)
        first.process.send_signal(signal.SIGKILL)
        killed = first.wait(timeout=60)
    assert "was lost" in killed.stderr
    delete_lease(output)
    committed = read_attempts(output)
    second = run_batchjob(*command, env=ray_environment)
    assert second.exit_code == 0, second.stderr
    assert sorted(read_rows(output)["position"].to_pylist()) == list(range(500))
    assert committed.items() <= read_attempts(output).items()
