"""An image that kills the process which decodes it costs its own shard, and no shard beside it."""

from __future__ import annotations

from pathlib import Path

from commands import run, table, write_slow_job

IMAGES, SHARD, POISON = 48, 4, 21

DEADLY_TRANSFORM = """\
import os


def deadly(image):
    if int(image.max()) == 0:
        os._exit(9)
    return image.float() / 255
"""


def test_only_the_shard_of_an_image_that_kills_loader_processes_is_given_up(tmp_path: Path) -> None:
    from PIL import Image

    write_slow_job(tmp_path, IMAGES)
    (tmp_path / "poison.py").write_text(DEADLY_TRANSFORM)
    names = ["black.png" if position == POISON else "tiny.png" for position in range(IMAGES)]
    (tmp_path / "manifest.csv").write_text("\n".join(["file", *names, ""]))
    Image.new("RGB", (8, 8), (0, 0, 0)).save(tmp_path / "black.png")
    ended = run(
        *("run", str(tmp_path / "job.yaml"), "--json", "preprocess={transform: poison:deadly}"),
        "runtime.loader.processes=2",
    )
    print(ended.err[-2000:])
    assert (ended.code, ended.answer["status"]) == (4, "incomplete"), ended.err
    shard = range(POISON // SHARD * SHARD, POISON // SHARD * SHARD + SHARD)
    found = table(tmp_path / "out")["position"].to_pylist()
    assert sorted(found) == [position for position in range(IMAGES) if position not in shard]
