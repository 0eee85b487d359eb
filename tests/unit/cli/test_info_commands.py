"""Commands `schema` and `env`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import batchjob
from batchjob.cli.main import main
from tests.support.small_bench import write_small_job


def test_schema_accepts_a_job_file_and_refuses_an_unknown_field(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    validation = pytest.importorskip("jsonschema")
    assert main(["schema"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    schema, job = json.loads(out), yaml.safe_load(write_small_job(tmp_path).read_text())
    validation.validate(job, schema)
    with pytest.raises(validation.ValidationError, match="batch_sise"):
        validation.validate({**job, "runtime": {"batch_sise": 3}}, schema)


def test_schema_has_no_other_format(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--json"]) == 2
    assert "No such option" in capfd.readouterr().err


def test_env_for_people_goes_to_stderr(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:secret@host:1")
    assert main(["env"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    facts = dict(line.split(maxsplit=1) for line in err.splitlines())
    assert facts["batchjob"] == batchjob.__version__
    assert facts["RAY_ADDRESS"] == "set"
    assert "GiB, limit " in facts["memory"]
    assert "secret" not in err
