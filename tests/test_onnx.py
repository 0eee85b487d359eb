"""ONNX models: held against the torch module they were exported from, and a sentence for whatever does not fit."""

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
from pydantic import ValidationError
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.onnx import OnnxModel
from batchjob.storage.reader import Reader

READER = Reader()


class Two(nn.Module):
    """A body with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x).relu().mean((2, 3))
        return self.head(features), features


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()


def exported(module: nn.Module, path: Path, batch: int | None = None, external: bool = False, **more: Any) -> str:
    """The module as an ONNX file, for any number of images or for `batch`."""
    shapes = ({0: torch.export.Dim("n")},) if batch is None else None
    program = torch.onnx.export(
        module.eval(),
        (torch.rand(batch or 2, 3, 8, 8),),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        verbose=False,
        **more,
    )
    assert program is not None
    program.save(str(path), external_data=external)
    return str(path)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(small(), tmp_path_factory.mktemp("onnx") / "small.onnx")


def load(weights: str, **more: Any) -> LoadedModel:
    return OnnxModel(weights=weights, **more).load(READER, Path())


def graph(path: Path, shape: list[Any], kind: int = TensorProto.FLOAT, **more: Any) -> str:
    """A graph whose output is its input `x`, in float32, of that shape and type."""
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    opset = [helper.make_opsetid("", more.pop("opset", 18))]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=opset)
    model.ir_version = more.pop("ir", 10)
    path.write_bytes(model.SerializeToString())
    return str(path)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_graph_gives_what_the_module_gave_for_any_number_of_images(plain: str, n: int) -> None:
    model = load(plain)
    x = torch.rand(n, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(x), small()(x), rtol=1e-5, atol=1e-6)
    assert (model.eager, model.batch_size, model.input_kind) == (False, None, "batch")
    assert (model.preprocess, model.labels) == (None, None)
    assert model.devices is not None
    assert "cpu" in model.devices


def test_results_stay_when_the_next_batch_is_run(plain: str) -> None:
    module = load(plain).module
    x, y = torch.rand(2, 2, 3, 8, 8)
    first = module(x)
    kept = first.clone()
    module(y)
    assert first.equal(kept)


def test_images_need_not_lie_in_memory_as_the_graph_wants_them(plain: str) -> None:
    module = load(plain).module
    x = torch.rand(2, 3, 8, 8)
    assert module(x.contiguous(memory_format=torch.channels_last)).equal(module(x))
    assert module(x.double()).equal(module(x))


def test_weights_beside_the_graph_come_from_any_storage(tmp_path: Path) -> None:
    path = Path(exported(small(), tmp_path / "big.onnx", external=True))
    data = path.with_name("big.onnx.data")
    x = torch.rand(3, 3, 8, 8)
    want = small()(x)
    for name in ("big.onnx", "big.onnx.data"):
        with fsspec.open(f"memory://onnx-external/{name}", "wb") as there:
            there.write((tmp_path / name).read_bytes())
    whole = hashlib.sha256(path.read_bytes() + data.read_bytes()).hexdigest()
    for place in (str(path), f"file://{path}", "memory://onnx-external/big.onnx"):
        model = load(place, sha256=whole)
        torch.testing.assert_close(model.module(x), want, rtol=1e-5, atol=1e-6)
        assert model.digest == whole
    alone = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InvalidJob, match=f"with its data has the sha256 {whole}"):
        load(str(path), sha256=alone)
    data.unlink()
    with pytest.raises(InvalidJob, match=r"big\.onnx keeps its weights beside it: there is no file .*big\.onnx\.data"):
        load(str(path))


def test_weights_are_looked_for_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    exported(small(), path, external=True)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidJob, match=r"lie in \.\./elsewhere\.data, which is not beside it"):
        load(str(path))


def test_a_fixed_batch_is_said(tmp_path: Path) -> None:
    model = load(exported(small(), tmp_path / "four.onnx", batch=4))
    assert model.batch_size == 4
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(model.module(x), small()(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidJob, match=r"images takes \[4, 3, 8, 8\], and the images come as \[3, 3, 8, 8\]"):
        model.module(x[:3])


def test_several_outputs_are_a_dict_and_any_of_them_may_be_chosen(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = Two().eval()
    weights = exported(net, tmp_path / "two.onnx", output_names=["logits", "features"])
    x = torch.rand(2, 3, 8, 8)
    logits, features = net(x)
    found = load(weights).module(x)
    assert list(found) == ["logits", "features"]
    torch.testing.assert_close(found["features"], features, rtol=1e-5, atol=1e-6)
    for output, want in (("logits", logits), ("features", features), (0, logits), (1, features)):
        torch.testing.assert_close(load(weights, output=output).module(x), want, rtol=1e-5, atol=1e-6)
    for output in ("boxes", 2):
        with pytest.raises(InvalidJob, match=r"the model gives logits, features; name one of them, or .* from 0 to 1"):
            load(weights, output=output)


@pytest.mark.parametrize(
    ("kind", "name"), [(TensorProto.FLOAT16, "float16"), (TensorProto.DOUBLE, "double"), (TensorProto.FLOAT, "float")]
)
def test_pixels_are_given_in_the_type_that_the_graph_takes(kind: int, name: str, tmp_path: Path) -> None:
    module = load(graph(tmp_path / f"{name}.onnx", ["n", 3, 4, 4], kind)).module
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(module(x), x.half().float() if name == "float16" else x, rtol=0, atol=0)


def test_whole_pixels_for_a_graph_of_uint8(tmp_path: Path) -> None:
    module = load(graph(tmp_path / "bytes.onnx", ["n", 3, 4, 4], TensorProto.UINT8)).module
    x = torch.randint(0, 256, (2, 3, 4, 4)).float()
    assert module(x).equal(x)
    for wrong in (x / 255, x - 1000, x + 1000):
        with pytest.raises(InvalidJob, match="scale: none, mean: null, std: null"):
            module(wrong)


@pytest.mark.parametrize(
    ("shape", "kind", "said"),
    [
        (["n", 224, 224, 3], TensorProto.FLOAT, r"channels last \(NHWC\).*--inputs-as-nchw x"),
        (["n", 3, 224], TensorProto.FLOAT, r"a batch of images is \[n, c, h, w\]"),
        (["n", 3, 224, 224], TensorProto.INT64, "float32, float16 or uint8 input"),
        (["n", 3, 224, 224], TensorProto.BFLOAT16, "float32, float16 or uint8 input"),
    ],
)
def test_graphs_that_take_no_images(shape: list[Any], kind: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=said):
        load(graph(tmp_path / "x.onnx", shape, kind))


def several(path: Path) -> str:
    """images × scale + offset, where offset is one number an image."""
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


def test_inputs_beside_the_images_have_values_in_the_job(tmp_path: Path) -> None:
    weights = several(tmp_path / "several.onnx")
    x = torch.rand(2, 3, 4, 4)
    for more in ({}, {"input": "images"}):
        module = load(weights, constants={"scale": 2, "offset": [[[0.5]]]}, **more).module
        torch.testing.assert_close(module(x), x * 2 + 0.5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, r"has the inputs images tensor\(float\) \[n, 3, 4, 4\], scale .* write model\.input: NAME"),
        ({"input": "image"}, r"model\.input: .*has no input 'image'; it has images"),
        ({"input": "images"}, r"model\.constants: no value for the input scale"),
        ({"constants": {"scal": 1}}, r"model\.constants: .*has no input scal; it has images"),
        ({"constants": {"scale": "big", "offset": [[[1]]]}}, r"the input scale takes tensor\(float\) \[\], and 'big'"),
        ({"constants": {"scale": 1, "offset": 1}}, r"so the value has the shape \[1, 1, 1\], and 1 has \[\]"),
    ],
)
def test_input_names_that_do_not_fit(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=said):
        load(several(tmp_path / "several.onnx"), **more)


def test_a_graph_newer_than_onnxruntime_says_what_to_do(tmp_path: Path) -> None:
    version = onnxruntime.__version__.replace(".", r"\.")
    with pytest.raises(InvalidJob, match=rf"has opset 99, and onnxruntime {version} knows them up to \d+; pip install"):
        load(graph(tmp_path / "opset.onnx", ["n", 3, 4, 4], opset=99))
    with pytest.raises(InvalidJob, match=rf"IR version 99, and onnxruntime {version} reads them up to \d+"):
        load(graph(tmp_path / "ir.onnx", ["n", 3, 4, 4], ir=99))


def test_operators_of_ones_own_are_refused(plain: str, tmp_path: Path) -> None:
    model = onnx.load(plain)
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
    ("content", "said"),
    [
        (b"", "is empty; copy the weights there again"),
        (b"rubbish", "is no whole ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_graph_is_said_plainly(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(InvalidJob, match=said):
        load(str(tmp_path / "x.onnx"))


def test_a_graph_cut_short_is_refused(plain: str, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(Path(plain).read_bytes()[:700])
    with pytest.raises(InvalidJob, match="is no whole ONNX file"):
        load(str(tmp_path / "x.onnx"))


def test_digest_and_cheap_check(plain: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(Path(plain).read_bytes()).hexdigest()
    assert load(plain, sha256=digest).digest == digest
    with pytest.raises(InvalidJob, match=rf"has the sha256 {digest}, but model\.sha256 is 0000"):
        load(plain, sha256="0" * 64)
    OnnxModel(weights=plain).check(READER, Path())
    with pytest.raises(InvalidJob, match=r"there is no file .*absent\.onnx"):
        OnnxModel(weights=str(tmp_path / "absent.onnx")).check(READER, Path())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_names_the_extra(missing: str, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (OnnxModel(weights=plain).check, OnnxModel(weights=plain).load):
        with pytest.raises(InvalidJob, match=rf"onnx needs {missing}; pip install 'batchjob\[onnx\]'"):
            call(READER, Path())


def test_providers_that_are_asked_for_and_absent_are_an_error(plain: str) -> None:
    x = torch.rand(2, 3, 8, 8)
    assert load(plain, providers=["cpu"]).module(x).equal(load(plain).module(x))
    for name, package in (("cuda", "gpu"), ("tensorrt", "gpu"), ("openvino", "openvino")):
        wanted = {"cuda": "CUDA", "tensorrt": "Tensorrt", "openvino": "OpenVINO"}[name] + "ExecutionProvider"
        if wanted in onnxruntime.get_available_providers():
            continue
        with pytest.raises(
            InvalidJob, match=rf"providers: {name} is not in .* which has cpu; install onnxruntime-{package}"
        ):
            load(plain, providers=[name, "cpu"])
    with pytest.raises(ValidationError):
        OnnxModel(weights=plain, providers=["rocket"])
    with pytest.raises(ValidationError):
        OnnxModel(weights=plain, providers=[])


def test_torch_and_its_threads_are_left_as_they_were(plain: str) -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    load(plain).module(torch.rand(1, 3, 8, 8, generator=torch.Generator()))
    assert torch.get_num_threads() == before[0]
    assert torch.get_rng_state().equal(before[1])
