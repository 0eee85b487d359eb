"""Retry of error rows on Ray."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.support.batchjob_process import read_all_footers, read_rows, run_batchjob, write_slow_job

IMAGES = 16


def test_ray_workers_replace_the_rows_of_repaired_images(tmp_path: Path, ray_environment: dict[str, str]) -> None:
    write_slow_job(tmp_path, 0)
    names = [f"{number}.png" for number in range(IMAGES)]
    (tmp_path / "manifest.csv").write_text("\n".join(["file", *names, ""]))
    for name in names:
        Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / name)
    (tmp_path / "5.png").write_bytes(b"no picture")
    arguments = [str(tmp_path / "job.yaml"), "--json", "--quiet", "errors.max_rate=0.5"]
    arguments += ["runtime.workers=2", "runtime.cpus_per_worker=1"]
    first = run_batchjob("run", *arguments)
    assert (first.exit_code, first.json_result["failed"]) == (0, 1), first.stderr
    before = read_rows(tmp_path / "out").to_pylist()
    (tmp_path / "5.png").write_bytes((tmp_path / "4.png").read_bytes())
    retried = run_batchjob("retry", *arguments, "--pool", "ray", env=ray_environment)
    assert (retried.exit_code, retried.json_result["status"], retried.json_result["failed"]) == (0, "complete", 0), (
        retried.stderr
    )
    after = read_rows(tmp_path / "out").to_pylist()
    assert after[5]["embedding"] == before[4]["embedding"]
    assert [row for row in after if row["position"] != 5] == [row for row in before if row["position"] != 5]
    assert [footer.revision for footer in read_all_footers(tmp_path / "out").values()] == [0, 1, 0, 0]
