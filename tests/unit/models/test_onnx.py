"""`type: onnx`: compared with the torch module that was exported, and a message for each graph that does not fit."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import fsspec
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.onnx import OnnxModel
from batchjob.storage.reader import Reader

READER = Reader()


class TwoOutputs(nn.Module):
    """Network with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x).relu().mean((2, 3))
        return self.head(features), features


def make_small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


def export(module: nn.Module, path: Path, batch: int | None = None, external: bool = False, **options: Any) -> str:
    """Export a module to an ONNX file, for any batch size or for `batch` images."""
    shapes = ({0: torch.export.Dim("n")},) if batch is None else None
    program = torch.onnx.export(
        module.eval(),
        (torch.rand(batch or 2, 3, 8, 8),),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        verbose=False,
        **options,
    )
    assert program is not None
    program.save(str(path), external_data=external)
    return str(path)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ONNX file of a small classifier."""
    return export(make_small(), tmp_path_factory.mktemp("onnx") / "small.onnx")


def load(weights: str, **settings: Any) -> LoadedModel:
    return OnnxModel(weights=weights, **settings).load(READER, Path())


def save_identity_graph(
    path: Path, shape: list[Any], element_type: int = TensorProto.FLOAT, opset: int = 18, ir_version: int = 10
) -> str:
    """Save a graph that casts its input `x` to float32."""
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    inputs = [helper.make_tensor_value_info("x", element_type, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = ir_version
    path.write_bytes(model.SerializeToString())
    return str(path)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_output_equals_that_of_the_module_for_any_batch_size(weights: str, n: int) -> None:
    model = load(weights)
    x = torch.rand(n, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(x), make_small()(x), rtol=1e-5, atol=1e-6)
    assert (model.eager, model.batch_size, model.input_kind) == (False, None, "batch")
    assert (model.preprocess, model.labels) == (None, None)
    assert model.devices is not None
    assert "cpu" in model.devices


def test_results_survive_the_next_batch(weights: str) -> None:
    module = load(weights).module
    x, y = torch.rand(2, 2, 3, 8, 8)
    first = module(x)
    copy = first.clone()
    module(y)
    assert first.equal(copy)


def test_pixels_may_have_any_memory_layout_and_dtype(weights: str) -> None:
    module = load(weights).module
    x = torch.rand(2, 3, 8, 8)
    assert module(x.contiguous(memory_format=torch.channels_last)).equal(module(x))
    assert module(x.double()).equal(module(x))


def test_external_data_loads_from_any_storage(tmp_path: Path) -> None:
    path = Path(export(make_small(), tmp_path / "big.onnx", external=True))
    data = path.with_name("big.onnx.data")
    x = torch.rand(3, 3, 8, 8)
    expected = make_small()(x)
    for name in ("big.onnx", "big.onnx.data"):
        with fsspec.open(f"memory://onnx-external/{name}", "wb") as file:
            file.write((tmp_path / name).read_bytes())
    digest = hashlib.sha256(path.read_bytes() + data.read_bytes()).hexdigest()
    for uri in (str(path), f"file://{path}", "memory://onnx-external/big.onnx"):
        model = load(uri, sha256=digest)
        torch.testing.assert_close(model.module(x), expected, rtol=1e-5, atol=1e-6)
        assert model.digest == digest
    graph_digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InvalidJob, match=f"with its data has the sha256 {digest}"):
        load(str(path), sha256=graph_digest)
    data.unlink()
    with pytest.raises(InvalidJob, match=r"big\.onnx keeps its weights beside it: there is no file .*big\.onnx\.data"):
        load(str(path))


def test_external_data_in_another_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    export(make_small(), path, external=True)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidJob, match=r"lie in \.\./elsewhere\.data, which is not beside it"):
        load(str(path))


def test_fixed_batch_size_is_reported(tmp_path: Path) -> None:
    model = load(export(make_small(), tmp_path / "four.onnx", batch=4))
    assert model.batch_size == 4
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(model.module(x), make_small()(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidJob, match=r"images takes \[4, 3, 8, 8\], and the images come as \[3, 3, 8, 8\]"):
        model.module(x[:3])


def test_several_outputs_are_a_dict_or_one_of_them(tmp_path: Path) -> None:
    torch.manual_seed(1)
    two_outputs = TwoOutputs().eval()
    weights = export(two_outputs, tmp_path / "two.onnx", output_names=["logits", "features"])
    x = torch.rand(2, 3, 8, 8)
    logits, features = two_outputs(x)
    results = load(weights).module(x)
    assert list(results) == ["logits", "features"]
    torch.testing.assert_close(results["features"], features, rtol=1e-5, atol=1e-6)
    for output, expected in (("logits", logits), ("features", features), (0, logits), (1, features)):
        torch.testing.assert_close(load(weights, output=output).module(x), expected, rtol=1e-5, atol=1e-6)
    for output in ("boxes", 2):
        with pytest.raises(InvalidJob, match=r"the model gives logits, features; name one of them, or .* from 0 to 1"):
            load(weights, output=output)


@pytest.mark.parametrize(
    ("element_type", "name"),
    [(TensorProto.FLOAT16, "float16"), (TensorProto.DOUBLE, "double"), (TensorProto.FLOAT, "float")],
)
def test_pixels_are_cast_to_the_type_of_the_input(element_type: int, name: str, tmp_path: Path) -> None:
    module = load(save_identity_graph(tmp_path / f"{name}.onnx", ["n", 3, 4, 4], element_type)).module
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(module(x), x.half().float() if name == "float16" else x, rtol=0, atol=0)


def test_uint8_input_needs_whole_pixels(tmp_path: Path) -> None:
    module = load(save_identity_graph(tmp_path / "bytes.onnx", ["n", 3, 4, 4], TensorProto.UINT8)).module
    x = torch.randint(0, 256, (2, 3, 4, 4)).float()
    assert module(x).equal(x)
    for wrong in (x / 255, x - 1000, x + 1000):
        with pytest.raises(InvalidJob, match="scale: none, mean: null, std: null"):
            module(wrong)


@pytest.mark.parametrize(
    ("shape", "element_type", "message"),
    [
        (["n", 224, 224, 3], TensorProto.FLOAT, r"channels last \(NHWC\).*--inputs-as-nchw x"),
        (["n", 3, 224], TensorProto.FLOAT, r"a batch of images is \[n, c, h, w\]"),
        (["n", 3, 224, 224], TensorProto.INT64, "float32, float16 or uint8 input"),
        (["n", 3, 224, 224], TensorProto.BFLOAT16, "float32, float16 or uint8 input"),
    ],
)
def test_graph_that_does_not_take_images_is_refused(
    shape: list[Any], element_type: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidJob, match=message):
        load(save_identity_graph(tmp_path / "x.onnx", shape, element_type))


def save_graph_with_constants(path: Path) -> str:
    """Save a graph that computes images × scale + offset, with one offset for each image."""
    nodes = [
        helper.make_node("Mul", ["images", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 4, 4]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("offset", TensorProto.FLOAT, ["n", 1, 1, 1]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 4, 4])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_other_inputs_take_their_values_from_the_job(tmp_path: Path) -> None:
    weights = save_graph_with_constants(tmp_path / "several.onnx")
    x = torch.rand(2, 3, 4, 4)
    for settings in ({}, {"input": "images"}):
        module = load(weights, constants={"scale": 2, "offset": [[[0.5]]]}, **settings).module
        torch.testing.assert_close(module(x), x * 2 + 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"has the inputs images tensor\(float\) \[n, 3, 4, 4\], scale .* write model\.input: NAME"),
        ({"input": "image"}, r"model\.input: .*has no input 'image'; it has images"),
        ({"input": "images"}, r"model\.constants: no value for the input scale"),
        ({"constants": {"scal": 1}}, r"model\.constants: .*has no input scal; it has images"),
        ({"constants": {"scale": "big", "offset": [[[1]]]}}, r"the input scale takes tensor\(float\) \[\], and 'big'"),
        ({"constants": {"scale": 1, "offset": 1}}, r"so the value has the shape \[1, 1, 1\], and 1 has \[\]"),
    ],
)
def test_wrong_inputs_are_explained(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=message):
        load(save_graph_with_constants(tmp_path / "several.onnx"), **settings)


def test_graph_newer_than_onnxruntime_is_explained(tmp_path: Path) -> None:
    version = onnxruntime.__version__.replace(".", r"\.")
    with pytest.raises(InvalidJob, match=rf"has opset 99, and onnxruntime {version} knows them up to \d+; pip install"):
        load(save_identity_graph(tmp_path / "opset.onnx", ["n", 3, 4, 4], opset=99))
    with pytest.raises(InvalidJob, match=rf"IR version 99, and onnxruntime {version} reads them up to \d+"):
        load(save_identity_graph(tmp_path / "ir.onnx", ["n", 3, 4, 4], ir_version=99))


def test_custom_operators_are_refused(weights: str, tmp_path: Path) -> None:
    model = onnx.load(weights)
    model.graph.node[0].domain = "my.ops"
    model.opset_import.add(domain="my.ops", version=1)
    path = tmp_path / "custom.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidJob, match=r"uses the operator my\.ops:Conv, .* libraries of operators are code"):
        load(str(path))
    model.graph.node[0].domain, model.graph.node[0].op_type = "", "Nonsense"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidJob, match="uses the operator Nonsense, which onnxruntime"):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty and not an ONNX model; copy the weights there again"),
        (b"rubbish", r"is a text file \(rubbish\) and not an ONNX model"),
        (b"\x00\x9frubbish", "is no whole ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ],
)
def test_file_without_a_graph_is_explained(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(InvalidJob, match=message):
        load(str(tmp_path / "x.onnx"))


def test_incomplete_graph_is_refused(weights: str, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(Path(weights).read_bytes()[:700])
    with pytest.raises(InvalidJob, match="is no whole ONNX file"):
        load(str(tmp_path / "x.onnx"))


def test_digest_and_check(weights: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert load(weights, sha256=digest).digest == digest
    with pytest.raises(InvalidJob, match=rf"has the sha256 {digest}, but model\.sha256 is 0000"):
        load(weights, sha256="0" * 64)
    OnnxModel(weights=weights).check(READER, Path())
    with pytest.raises(InvalidJob, match=r"there is no file .*absent\.onnx"):
        OnnxModel(weights=str(tmp_path / "absent.onnx")).check(READER, Path())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_package_is_named_with_its_installation(
    missing: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (OnnxModel(weights=weights).check, OnnxModel(weights=weights).load):
        with pytest.raises(InvalidJob, match=rf"onnx needs {missing}; .*pip install .*onnxruntime"):
            call(READER, Path())


def test_absent_providers_are_refused(weights: str) -> None:
    x = torch.rand(2, 3, 8, 8)
    assert load(weights, providers=["cpu"]).module(x).equal(load(weights).module(x))
    for name, package in (("cuda", "gpu"), ("tensorrt", "gpu"), ("openvino", "openvino")):
        full_name = {"cuda": "CUDA", "tensorrt": "Tensorrt", "openvino": "OpenVINO"}[name] + "ExecutionProvider"
        if full_name in onnxruntime.get_available_providers():
            continue
        with pytest.raises(
            InvalidJob, match=rf"providers: {name} is not in .* which has cpu; install onnxruntime-{package}"
        ):
            load(weights, providers=[name, "cpu"])
    with pytest.raises(InvalidJob):
        OnnxModel(weights=weights, providers=["rocket"])
    with pytest.raises(InvalidJob):
        OnnxModel(weights=weights, providers=[])


def test_torch_threads_and_rng_state_are_unchanged(weights: str) -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    load(weights).module(torch.rand(1, 3, 8, 8, generator=torch.Generator()))
    assert torch.get_num_threads() == before[0]
    assert torch.get_rng_state().equal(before[1])
