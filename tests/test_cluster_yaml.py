"""cluster.yaml fits the installed Ray's schema, and is as closed as SECURITY.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


@pytest.fixture(scope="module")
def filled(given: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it before it asks AWS for anything: defaults merged, then validated."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(given)
    validate_config(config)
    return config


def test_ray_takes_it(filled: dict[str, Any]) -> None:
    assert filled["available_node_types"]["gpu"]["max_workers"] <= filled["max_workers"]
    assert filled["available_node_types"]["head"]["max_workers"] == 0


def test_ray_refuses_a_key_it_does_not_know(given: dict[str, Any]) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="head_node_typo"):
        validate_config(prepare_config({**given, "head_node_typo": "head"}))


def test_the_defaults_of_ray_do_not_shine_through(given: dict[str, Any]) -> None:
    """Ray's default commands install a nightly wheel and open the dashboard to the world: each list is given here."""
    lists = ["setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"]
    assert all(name in given for name in lists)


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_ray_asks_for_the_token(given: dict[str, Any], role: str) -> None:
    starts = [line for line in given[f"{role}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 1
    assert "RAY_AUTH_MODE=token ray start" in starts[0]


def test_the_token_comes_from_a_file(given: dict[str, Any]) -> None:
    assert given["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN\b|[0-9a-f]{32}", FILE.read_text())


def test_the_dashboard_listens_on_loopback_only(given: dict[str, Any]) -> None:
    (start,) = [line for line in given["head_start_ray_commands"] if "ray start" in line]
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]
    assert "0.0.0.0" not in FILE.read_text()


def test_the_head_has_no_work(given: dict[str, Any]) -> None:
    assert given["available_node_types"][given["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}


def test_workers_have_gpus_and_are_on_spot(given: dict[str, Any]) -> None:
    workers = {name: node for name, node in given["available_node_types"].items() if name != given["head_node_type"]}
    assert workers
    for node in workers.values():
        assert node["resources"]["GPU"] >= 1
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_nodes_install_the_lock_and_the_wheel(given: dict[str, Any]) -> None:
    assert {"requirements.lock", "dist"} <= set(given["file_mounts"].values())
    commands = "\n".join(given["setup_commands"])
    assert "--require-hashes -r ~/batchjob/requirements.lock" in commands
    assert "--no-deps --force-reinstall ~/batchjob/dist/batchjob-*.whl" in commands
