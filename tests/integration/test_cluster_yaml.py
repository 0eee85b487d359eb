"""cluster.yaml: the installed Ray accepts it, and it is as closed as SECURITY.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


@pytest.fixture(scope="module")
def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config as `ray up` completes and validates it, before its first request to AWS."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    merged: dict[str, Any] = prepare_config(config)
    validate_config(merged)
    return merged


def test_ray_accepts_the_file(complete_config: dict[str, Any]) -> None:
    assert complete_config["available_node_types"]["gpu"]["max_workers"] <= complete_config["max_workers"]
    assert complete_config["available_node_types"]["head"]["max_workers"] == 0


def test_ray_refuses_an_unknown_key(config: dict[str, Any]) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="head_node_typo"):
        validate_config(prepare_config({**config, "head_node_typo": "head"}))


def test_no_command_list_is_left_to_ray_defaults(config: dict[str, Any]) -> None:
    """Ray's default commands install a nightly wheel and open the dashboard to every network."""
    lists = ["setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"]
    assert all(name in config for name in lists)


@pytest.mark.parametrize("role", ["head", "worker"])
def test_each_node_requires_the_token(config: dict[str, Any], role: str) -> None:
    starts = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 1
    assert "RAY_AUTH_MODE=token ray start" in starts[0]


def test_token_comes_from_a_file(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN\b|[0-9a-f]{32}", FILE.read_text())


def test_dashboard_listens_on_loopback_only(config: dict[str, Any]) -> None:
    (start,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]
    assert "0.0.0.0" not in FILE.read_text()


def test_head_runs_no_workers(config: dict[str, Any]) -> None:
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}


def test_workers_have_gpus_and_are_spot_instances(config: dict[str, Any]) -> None:
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert workers
    for node in workers.values():
        assert node["resources"]["GPU"] >= 1
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_nodes_install_the_lock_and_the_wheel(config: dict[str, Any]) -> None:
    assert {"requirements.lock", "dist"} <= set(config["file_mounts"].values())
    commands = "\n".join(config["setup_commands"])
    assert "--require-hashes -r ~/batchjob/requirements.lock" in commands
    assert "--no-deps --force-reinstall ~/batchjob/dist/batchjob-*.whl" in commands
