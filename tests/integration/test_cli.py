"""Command line: exit codes, text on stderr, one JSON object on stdout, resources in a control group."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import batchjob
from batchjob.cli.main import main
from batchjob.system import cgroup_cpu_quota, cgroup_memory_limit

NET = """
from torch import nn

def make():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    nn.init.constant_(net[2].weight, 0.5)
    nn.init.constant_(net[2].bias, 0.0)
    return net
"""

JOB = """\
input: {type: prefix, uri: images/, extensions: all}
model: {type: python, target: "net:make"}
preprocess: {resize: null, crop: null, mean: null, std: null}
task: {type: classification, labels: [a, b, c, d]}
runtime: {pool: local, device: cpu, shard_size: 4, loader: {processes: 0}}
errors: {max_rate: 0.5}
output: {uri: out}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a job of ten images, one of them broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def read_last_object(said: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def test_signal_after_the_result_does_not_change_the_exit_code(folder: Path) -> None:
    command = [sys.executable, "-m", "batchjob", "run", "job.yaml", "--json", "--quiet"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert read_last_object(running.stdout.readline())["status"] == "complete"
        running.terminate()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full", ">&- 2>/dev/full", "0<&- 1>&- 2>&-", "1>/dev/full"])
def test_run_whose_output_cannot_be_written_goes_on(folder: Path, stream: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m batchjob run job.yaml --json {stream}"
    assert subprocess.run(["sh", "-c", command], cwd=folder, check=False, timeout=120).returncode == 0
    assert (folder / "out/_SUCCESS").exists()


@pytest.mark.parametrize(
    ("arguments", "stream"), [("status out --json", "1>"), ("status out", "2>"), ("env --json", "1>")]
)
def test_answer_that_cannot_be_written_is_temporary(folder: Path, arguments: str, stream: str) -> None:
    assert main(["plan", "job.yaml"]) == 0
    command = f"exec {shlex.quote(sys.executable)} -m batchjob {arguments} {stream} /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=folder, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 75
    told = "the JSON object could not be written to stdout: No space left on device\n"
    assert done.stderr == (told if stream == "1>" else "")


def test_result_that_cannot_be_written_is_said(folder: Path) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m batchjob run no.yaml --json > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=folder, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the JSON object could not be written to stdout: No space left on device" in done.stderr


@pytest.mark.parametrize("command", ["status", "errors", "discard"])
def test_empty_name_of_an_output_is_not_the_working_directory(
    folder: Path, command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`discard "$OUT" --yes` has it where OUT is not set."""
    assert main(["plan", "job.yaml"]) == 0
    monkeypatch.chdir(folder / "out")
    assert main([command, "", *(["--yes"] if command == "discard" else [])]) == 2
    assert "the output's name is empty" in capfd.readouterr().err
    assert main(["status", "."]) == 0


def test_status_of_a_file_says_that_it_is_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "weights.pt").touch()
    assert main(["status", "weights.pt"]) == 2
    assert "weights.pt is a file; name a job file (.yaml), or the folder" in capfd.readouterr().err


def test_run_whose_reader_is_gone_goes_on(folder: Path) -> None:
    command = [sys.executable, "-m", "batchjob", "run", "job.yaml"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        running.stderr.close()
        assert running.wait(120) == 0
    assert (folder / "out/_SUCCESS").exists()


def test_deleted_working_directory_is_told_in_a_sentence(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    for arguments in (["run", "job.yaml"], ["validate", str(folder / "job.yaml")], ["status", "out"]):
        assert main(arguments) == 2
        assert capfd.readouterr().err.count("working directory of this process has been deleted; cd into") == 1


def test_run_of_an_eager_model_loads_no_more_of_the_compiler_than_torchvision_does(folder: Path) -> None:
    program = (
        "import sys; from batchjob.cli.main import main; "
        "print(main(sys.argv[1:]), 'torch._inductor.compile_fx' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "run", "job.yaml", "--quiet"]
    done = subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "0 False\n"


def test_list_of_commands_is_not_cut(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    assert "Commands:" in out
    assert "..." not in out.partition("Commands:")[2]


def test_run_status_errors_and_discard_agree(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.yaml", "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    outcome = read_last_object(out)
    assert outcome.items() >= {"status": "complete", "planned": 10, "predicted": 9, "failed": 1, "exit_code": 0}.items()
    assert outcome["output"].rstrip("/") == str(folder / "out")
    assert "complete: 10 images, 9 predicted, 1 failed" in err

    assert main(["status", "out", "--json"]) == 0
    status = read_last_object(capfd.readouterr().out)
    assert status.items() >= {"status": "complete", "planned": 10, "rows": 10, "failed": 1, "parts": 3}.items()
    assert main(["status", "job.yaml"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "complete" in err

    assert main(["errors", "out", "--json"]) == 0
    *rows, counts = map(json.loads, capfd.readouterr().out.splitlines())
    assert [Path(row["uri"]).name for row in rows] == ["broken.png"]
    assert counts["total"] == 1
    assert main(["errors", "job.yaml"]) == 0
    assert "broken.png: decode/" in capfd.readouterr().err

    assert main(["run", "job.yaml", "--json", "task.top_k=2"]) == 2
    out, err = capfd.readouterr()
    assert read_last_object(out)["status"] == "invalid"
    assert "task.top_k: not set there, 2 here" in err
    assert main(["run", "job.yaml", "--json", "--quiet"]) == 0
    assert read_last_object(capfd.readouterr().out)["status"] == "already_complete"

    assert main(["discard", "out"]) == 2
    assert "add --yes" in capfd.readouterr().err
    assert main(["discard", "out", "--yes"]) == 0
    assert not list((folder / "out/predictions").iterdir())


def test_exceeded_error_budget_is_exit_3(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.yaml", "--quiet", "--json", "errors.max_rate=0"]) == 3
    out, err = capfd.readouterr()
    assert read_last_object(out)["status"] == "over_budget"
    assert "batchjob errors" in err
    assert not (folder / "out/_SUCCESS").exists()


def test_invalid_job_file_is_exit_2_with_its_location(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("job.yaml").write_text(JOB.replace("target", "targte"))
    for command in ("run", "validate", "plan", "status", "errors", "discard"):
        assert main([command, "job.yaml", "--json", *(["--yes"] if command == "discard" else [])]) == 2
        out, err = capfd.readouterr()
        assert err == "job.yaml:2:23: model.targte: not a field of this model; did you mean 'target'?\n"
        assert read_last_object(out).items() >= {"status": "invalid", "exit_code": 2, "message": err.strip()}.items()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["run"], "Missing argument 'JOB.yaml'"),
        (["run", "job.yaml", "--nonsense"], "No such option"),
        (["dance"], "No such command 'dance'"),
        (["run", "job.yaml", "-p", "dt"], "'dt' is no parameter; write -p name=value"),
        (["run", "job.yaml", "-p", "a=1", "-p", "a=2"], "-p a=… is given twice; keep one"),
        (["run", "job.yaml", "--pool", "mars"], "mars"),
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["status", "out", "model.name=x"], "takes neither -p nor section.key=value"),
    ],
)
def test_wrong_usage_is_exit_2(folder: Path, args: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*args, "--json"]) == 2
    out, err = capfd.readouterr()
    assert sentence in err
    assert read_last_object(out)["exit_code"] == 2


def test_unexpected_exception_is_exit_1_with_a_traceback(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.report.output_status.read_status", lambda *_: 1 // 0)
    assert main(["status", "out", "--json"]) == 1
    out, err = capfd.readouterr()
    assert "Traceback" in err
    assert read_last_object(out)["status"] == "crashed"


@pytest.mark.parametrize("head", ["no json", "[]", '{"format": 1}', '{"format": 1, "plan": "x"}'])
def test_damaged_plan_head_is_exit_2_and_named(folder: Path, head: str, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "out/_batchjob/plans/0000").mkdir(parents=True)
    (folder / "out/_batchjob/plans/0000/head.json").write_text(head)
    for command in (["status", "out"], ["run", "job.yaml"], ["discard", "out", "--yes"]):
        assert main([*command, "--json"]) == 2
        out, err = capfd.readouterr()
        assert "out/_batchjob/plans/0000/head.json is damaged" in err
        assert "Traceback" not in err
        assert read_last_object(out)["status"] == "invalid"


def test_validate_checks_input_model_and_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "job.yaml"]) == 0
    assert "input     " in (said := capfd.readouterr().err)
    assert "10 images" in said
    assert f"output    {folder / 'out'}: to be planned" in said
    assert main(["validate", "job.yaml", "input.require.min_images=11", "--json"]) == 75
    assert "min_images asks for 11" in read_last_object(capfd.readouterr().out)["message"]
    assert not (folder / "out").exists()
    assert main(["plan", "job.yaml", "--quiet"]) == 0
    assert main(["validate", "job.yaml"]) == 0
    assert "of this job, 0 parts committed" in capfd.readouterr().err
    assert main(["validate", "job.yaml", "task.top_k=2"]) == 2
    assert "belongs to another job:\n  task.top_k: not set there, 2 here" in capfd.readouterr().err


@pytest.mark.parametrize(("where", "said"), [("file", "Not a directory"), ("file/x", "Not a directory")])
def test_output_at_or_below_a_file_is_exit_2(
    folder: Path, where: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").touch()
    assert main(["run", "job.yaml", "--quiet", f"output.uri={where}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    assert "choose an output folder" in line


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_output_that_cannot_be_created_is_exit_2(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert folder.is_dir()
    assert main(["run", "job.yaml", "--quiet", "output.uri=/proc/x"]) == 2
    assert "/proc/x: no folder can be made there" in capfd.readouterr().err


def test_validate_and_run_refuse_an_empty_input_alike(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    said = []
    for command in ("validate", "run"):
        assert main([command, "job.yaml", "input.uri=empty/"]) == 2
        said.append(capfd.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]
    assert "no images there" in said[0]


def test_resumed_run_counts_errors_of_committed_parts(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.yaml", "--quiet", "errors.max_rate=0"]) == 3
    capfd.readouterr()
    assert main(["run", "job.yaml"]) == 0
    err = capfd.readouterr().err
    assert "10 images, 1 error" in err
    assert "stopping" not in err
    assert "complete: 10 images, 9 predicted, 1 failed" in err


def test_folder_in_place_of_a_job_file_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert folder.is_dir()
    assert main(["retry", "images"]) == 2
    assert "images: is a folder; give the path of a job file" in capfd.readouterr().err


def test_repair_restores_missing_parts_of_a_finished_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.yaml", "--quiet"]) == 0
    min((folder / "out/predictions").iterdir()).unlink()
    assert main(["run", "job.yaml", "--quiet"]) == 3
    assert "1 part gone, changed or added" in (said := capfd.readouterr().err)
    assert "batchjob run --repair" in said
    assert main(["run", "job.yaml", "--quiet", "--repair", "--json"]) == 0
    assert (
        read_last_object(capfd.readouterr().out).items() >= {"status": "complete", "planned": 10, "failed": 1}.items()
    )


def test_status_does_not_create_an_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "job.yaml", "--json"]) == 2
    assert "no plan here" in read_last_object(capfd.readouterr().out)["message"]
    assert not (folder / "out").exists()


def test_version_help_and_schema_go_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"batchjob {batchjob.__version__}\n"
    assert main(["run", "--help"]) == 0
    assert "--allow-empty" in capfd.readouterr().out
    assert main(["schema"]) == 0
    assert json.loads(capfd.readouterr().out)["title"] == "batchjob job"


def test_env_reports_versions_and_resources_without_secrets(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:secret@host:1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    assert main(["env", "--json"]) == 0
    out, _ = capfd.readouterr()
    found = read_last_object(out)
    assert found["packages"]["batchjob"] == batchjob.__version__
    assert found["cores"]["allowed"] >= 1
    assert found["ray"]["address_given"] is True
    assert "secret" not in out
    assert "hidden" not in out
    assert found["torch"]["threads"] >= 1


def test_status_loads_neither_torch_nor_ray(folder: Path) -> None:
    assert main(["plan", "job.yaml", "--quiet"]) == 0
    command = [sys.executable, "-X", "importtime", "-m", "batchjob", "status", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "batchjob.cli.main" in loaded
    assert not {name for name in loaded if name.split(".")[0] in {"torch", "ray", "torchvision"}}


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cores_and_memory_are_limited_by_the_control_group(tmp_path: Path) -> None:
    second = write_files(
        tmp_path / "v2",
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/b/memory.max": "1073741824\n",
            "sys/fs/cgroup/a/memory.max": "max\n",
        },
    )
    assert (cgroup_cpu_quota(second), cgroup_memory_limit(second)) == (1.5, 1 << 30)
    first = write_files(
        tmp_path / "v1",
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/x\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert (cgroup_cpu_quota(first), cgroup_memory_limit(first)) == (2.0, None)
    assert (cgroup_cpu_quota(tmp_path), cgroup_memory_limit(tmp_path)) == (None, None)
