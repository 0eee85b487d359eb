"""Weights published by torchvision: their architectures, and their files from web, cache and mirror."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from batchjob.errors import InvalidJob, Unavailable
from batchjob.models.architecture import build_torchvision
from batchjob.models.torchvision import TorchvisionModel
from batchjob.models.torchvision_weights import (
    PublishedWeights,
    fetch_weights,
    find_weights_by_file,
    find_weights_by_name,
)
from batchjob.storage.reader import Reader

READER = Reader()
DATA = b"weights as published"
FILE_NAME = f"tiny-{hashlib.sha256(DATA).hexdigest()[:8]}.pth"


class WeightServer(http.server.BaseHTTPRequestHandler):
    """Weight server of torchvision, with one folder for each kind of response."""

    def do_GET(self) -> None:
        code = {"/503/": 503, "/404/": 404}.get(self.path.removesuffix(FILE_NAME), 200)
        body = b"something else" if self.path.startswith("/wrong/") else DATA
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + (5 if self.path.startswith("/cut/") else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], PublishedWeights]]:
    """Function that makes weights in a folder of a local weight server; torch's cache is in a temporary folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), WeightServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        port = server.server_address[1]
        yield lambda folder: PublishedWeights(
            "Tiny_Weights.V1", f"http://127.0.0.1:{port}/{folder}/{FILE_NAME}", None, None, {}
        )
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50", "DEFAULT"),
        ("googlenet", "IMAGENET1K_V1"),
        ("inception_v3", "IMAGENET1K_V1"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("maxvit_t", "IMAGENET1K_V1"),
        ("vgg16", "IMAGENET1K_FEATURES"),
        ("swin_v2_t", "Swin_V2_T_Weights.IMAGENET1K_V1"),
    ],
)
def test_published_weights_fit_their_architecture(name: str, weights: str) -> None:
    published = find_weights_by_name(name, weights)
    with torch.device("meta"):
        module = build_torchvision(name, "model.name", published.arguments)
    count = sum(
        parameter.numel() for key, parameter in module.named_parameters() if not (name == "googlenet" and "aux" in key)
    )
    member = torchvision.models.get_model_weights(name)[weights.rpartition(".")[2]]
    assert count == member.meta["num_params"]
    assert published.preprocess is not None
    assert find_weights_by_file(name, published.file_name) == published


def test_published_file_is_downloaded_once_and_cached(
    publish: Callable[[str], PublishedWeights], tmp_path: Path
) -> None:
    weights = publish("complete")
    assert fetch_weights(weights, READER, None) == (DATA, weights.url)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / FILE_NAME
    assert [file.name for file in cached.parent.iterdir()] == [FILE_NAME]
    assert fetch_weights(publish("404"), READER, None) == (DATA, str(cached))
    cached.write_bytes(b"damaged")
    with pytest.raises(InvalidJob, match="is not what torchvision published"):
        fetch_weights(weights, READER, None)


@pytest.mark.parametrize(
    ("folder", "error_type"), [("503", Unavailable), ("404", InvalidJob), ("wrong", InvalidJob), ("cut", Unavailable)]
)
def test_failed_download_leaves_no_file(
    folder: str, error_type: type[Exception], publish: Callable[[str], PublishedWeights], tmp_path: Path
) -> None:
    with pytest.raises(error_type):
        fetch_weights(publish(folder), READER, None)
    assert not (tmp_path / "torch").exists()


def test_mirror_holds_files_under_their_published_names(
    publish: Callable[[str], PublishedWeights], tmp_path: Path
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with pytest.raises(InvalidJob, match=rf"model\.mirror, for Tiny_Weights.V1 .*there is no file .*{FILE_NAME}"):
        fetch_weights(publish("complete"), READER, str(mirror))
    (mirror / FILE_NAME).write_bytes(DATA)
    assert fetch_weights(publish("complete"), READER, f"{mirror}/") == (DATA, str(mirror / FILE_NAME))
    (mirror / FILE_NAME).write_bytes(b"something else")
    with pytest.raises(InvalidJob, match="copy it again from"):
        fetch_weights(publish("complete"), READER, str(mirror))


def test_message_offline_says_how_to_provide_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(Unavailable) as caught:
        TorchvisionModel(name="resnet18", weights="DEFAULT").load(READER, tmp_path)
    for phrase in (
        find_weights_by_name("resnet18", "DEFAULT").file_name,
        "model.mirror",
        "model.weights",
        "ResNet18_Weights.IMAGENET1K_V1",
    ):
        assert phrase in caught.value.message
