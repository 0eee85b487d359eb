"""Error rows retried by the workers of a Ray."""

from __future__ import annotations

from pathlib import Path

from commands import footers, own_ray, run, table, write_slow_job
from PIL import Image

IMAGES = 16


def test_what_was_mended_is_replaced_by_ray_workers(tmp_path: Path) -> None:
    write_slow_job(tmp_path, 0)
    names = [f"{number}.png" for number in range(IMAGES)]
    (tmp_path / "manifest.csv").write_text("\n".join(["file", *names, ""]))
    for name in names:
        Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / name)
    (tmp_path / "5.png").write_bytes(b"no picture")
    arguments = [str(tmp_path / "job.yaml"), "--json", "--quiet", "errors.max_rate=0.5"]
    arguments += ["runtime.workers=2", "runtime.cpus_per_worker=1"]
    first = run("run", *arguments)
    assert (first.code, first.answer["failed"]) == (0, 1), first.err
    before = table(tmp_path / "out").to_pylist()
    (tmp_path / "5.png").write_bytes((tmp_path / "4.png").read_bytes())
    with own_ray() as env:
        ended = run("retry", *arguments, "--pool", "ray", env=env)
    assert (ended.code, ended.answer["status"], ended.answer["failed"]) == (0, "complete", 0), ended.err
    after = table(tmp_path / "out").to_pylist()
    assert after[5]["embedding"] == before[4]["embedding"]
    assert [row for row in after if row["position"] != 5] == [row for row in before if row["position"] != 5]
    assert [made.revision for made in footers(tmp_path / "out").values()] == [0, 1, 0, 0]
