"""Predictor and forward pass: equality with a plain loop, gradient modes, precision, and out-of-memory errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import AttemptFailed, InvalidJob
from batchjob.inference.devices import check_precision, get_device_capabilities, pick_device
from batchjob.inference.example_images import random_pixels
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.forward import ForwardOptions, ForwardPass
from batchjob.inference.predictor import Predictor
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess
from batchjob.types import Prediction

CPU = torch.device("cpu")
PREPROCESS = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class IdentityPostprocess:
    """Postprocess that returns the model's output unchanged."""

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        assert torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
        return {"embedding": output}


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
        self.calls: list[tuple[int, torch.dtype, bool, bool]] = []

    def forward(self, images: torch.Tensor) -> Any:
        out = self.layers(images)
        self.calls.append((len(images), out.dtype, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return out


class NetWithRoom(SmallNet):
    """Network that runs out of memory beyond `room` images, and for an image whose first pixel is 255."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error = room, error

    def forward(self, images: torch.Tensor) -> Any:
        if len(images) > self.room or bool((images[:, 0, 0, 0] > 2.2).any()):
            self.calls.append((len(images), images.dtype, False, False))
            raise self.error
        return super().forward(images)


class VersionReadingNet(SmallNet):
    """Network that reads version counters, which inference tensors do not have."""

    def forward(self, images: torch.Tensor) -> Any:
        assert images._version >= 0
        return super().forward(images)


class FailingNet(SmallNet):
    def forward(self, images: torch.Tensor) -> Any:
        return images.flatten(1) @ images.flatten(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    yield
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    del state


def make_images(rows: int) -> torch.Tensor:
    return torch.randint(0, 250, (rows, 3, 8, 8), dtype=torch.uint8)


def make_forward(
    module: nn.Module, precision: Any = "fp32", grad_mode: Any = "inference", device: torch.device = CPU, **modes: Any
) -> ForwardPass:
    return ForwardPass(
        module.eval(),
        Normalizer(PREPROCESS),
        device,
        ForwardOptions(grad_mode, config=ExecutionConfig(precision=precision), **modes),
    )


def make_predictor(module: nn.Module, precision: Any = "fp32", grad_mode: Any = "inference") -> Predictor:
    return Predictor(make_forward(module, precision, grad_mode), IdentityPostprocess())


def embeddings(predicted: Prediction) -> torch.Tensor:
    """Return the vectors of all predicted images, in the order of the batch."""
    outputs = {
        row: vector
        for piece in predicted.wait().outputs
        for row, vector in zip(piece.rows, piece.tensors["embedding"], strict=True)
    }
    return torch.stack([outputs[row] for row in sorted(outputs)])


def plain_loop(module: SmallNet, pixels: torch.Tensor) -> torch.Tensor:
    values = pixels.float() / 255
    mean, std = (torch.tensor(moments).view(3, 1, 1) for moments in (PREPROCESS.mean, PREPROCESS.std))
    with torch.no_grad():
        out: torch.Tensor = module.layers((values - mean) / std)
    return out


@pytest.mark.parametrize("grad_mode", ["inference", "no_grad"])
def test_predictions_equal_a_plain_loop(grad_mode: Any) -> None:
    module, pixels = SmallNet(), make_images(7)
    predictor = make_predictor(module, grad_mode=grad_mode)
    predictor.warm_up((8, 8))
    predictor.warm_up((3, 8, 8), rows=3)
    prediction = predictor(pixels)
    torch.testing.assert_close(embeddings(prediction), plain_loop(module, pixels), rtol=0, atol=0)
    assert not prediction.errors
    assert [call[0] for call in module.calls] == [2, 3, 7]
    assert {call[2] for call in module.calls} == {grad_mode == "inference"}
    assert {call[3] for call in module.calls} == {False}


def test_warm_up_returns_seconds_without_drawing_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def draw_pixels(*arguments: Any) -> torch.Tensor:
        now[0] += 100.0
        return random_pixels(*arguments)

    class SlowNet(SmallNet):
        def forward(self, images: torch.Tensor) -> Any:
            now[0] += 3.0
            return super().forward(images)

    monkeypatch.setattr("batchjob.inference.predictor.random_pixels", draw_pixels)
    monkeypatch.setattr("batchjob.inference.predictor.time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert make_predictor(SlowNet()).warm_up((8, 8), rows=4) == 3.0
    assert now == [103.0]


def test_bf16_uses_autocast_and_returns_float32() -> None:
    module, pixels = SmallNet(), make_images(3)
    prediction = make_predictor(module, "bf16")(pixels)
    assert module.calls[0][1] == torch.bfloat16
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert embeddings(prediction).dtype == torch.float32
    torch.testing.assert_close(embeddings(prediction), plain_loop(module, pixels), rtol=0.05, atol=0.05)


def test_output_of_own_transform_is_not_normalized() -> None:
    module, values = SmallNet(), torch.rand(3, 3, 8, 8)
    as_it_is = Normalizer(Preprocess(transform="net:f"))
    predictor = Predictor(ForwardPass(module.eval(), as_it_is, CPU, ForwardOptions()), IdentityPostprocess())
    predictor.warm_up((8, 8), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(embeddings(predictor(values)), module.layers(values), rtol=0, atol=0)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_batch_out_of_memory_is_halved_and_the_size_is_kept(error: Exception) -> None:
    module, pixels = NetWithRoom(3, error), make_images(10)
    predictor = make_predictor(module)
    prediction = predictor(pixels)
    torch.testing.assert_close(embeddings(prediction), plain_loop(module, pixels))
    assert not prediction.errors
    assert [call[0] for call in module.calls] == [10, 5, 2, 2, 2, 2, 2]
    module.calls.clear()
    predictor(pixels[:4])
    assert [call[0] for call in module.calls] == [2, 2]
    module.room = 100
    for _ in range(100):
        predictor(pixels[:4])
    module.calls.clear()
    predictor(pixels[:4])
    assert [call[0] for call in module.calls] == [4], "a larger batch is tried again after a while without errors"


def test_image_too_large_for_memory_is_an_error_of_its_own() -> None:
    module, pixels = NetWithRoom(100, OUT_OF_MEMORY[0]), make_images(9)
    pixels[4, 0, 0, 0] = 255
    predictor = make_predictor(module)
    prediction = predictor(pixels)
    assert {row: fault.type for row, fault in prediction.errors.items()} == {4: "memory"}
    good = [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(embeddings(prediction), plain_loop(module, pixels)[good])
    module.calls.clear()
    predictor(make_images(9))
    assert [call[0] for call in module.calls] == [9], "the image was too large, not the batch"
    assert predictor(pixels[4:5]).errors.keys() == {0}


def test_predict_single_predicts_one_image_of_a_batch() -> None:
    module, pixels = NetWithRoom(100, OUT_OF_MEMORY[0]), make_images(4)
    pixels[2, 0, 0, 0] = 255
    predictor = make_predictor(module)
    alone = [predictor.predict_single(pixels, None, row) for row in range(4)]
    assert [piece.rows for prediction in alone for piece in prediction.outputs] == [(0,), (1,), (3,)]
    assert [list(prediction.errors) for prediction in alone] == [[], [], [2], []]
    outputs = torch.cat([prediction.outputs[0].tensors["embedding"] for prediction in alone if prediction.outputs])
    torch.testing.assert_close(outputs, plain_loop(module, pixels)[[0, 1, 3]])


def test_no_image_fitting_fails_the_attempt() -> None:
    predictor = make_predictor(NetWithRoom(0, OUT_OF_MEMORY[0]))
    with pytest.raises(AttemptFailed, match="not even one image fits into the memory of cpu"):
        predictor(make_images(3))


def test_other_model_errors_are_raised_unchanged() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        make_predictor(FailingNet())(make_images(3))


def test_failure_in_inference_mode_only_names_grad_mode() -> None:
    with pytest.raises(InvalidJob, match=r"runtime\.grad_mode: no_grad") as caught:
        make_predictor(VersionReadingNet()).warm_up((8, 8))
    assert "Inference tensors do not track version counter" in caught.value.message
    predictor = make_predictor(VersionReadingNet(), grad_mode="no_grad")
    predictor.warm_up((8, 8))
    assert len(embeddings(predictor(make_images(2)))) == 2


def test_failing_model_is_reported_with_its_error() -> None:
    for grad_mode in ("inference", "no_grad"):
        with pytest.raises(InvalidJob, match=r"example batch of shape 2x3x8x8 on cpu: RuntimeError: .*mat1 and mat2"):
            make_predictor(FailingNet(), grad_mode=grad_mode).warm_up((8, 8))


def test_example_run_does_not_change_the_generator() -> None:
    state = torch.get_rng_state()
    assert make_forward(SmallNet()).run_example(make_images(2)).shape == (2, 5)
    make_predictor(SmallNet()).warm_up((8, 8))
    state = torch.get_rng_state()
    make_nothing = make_forward(nn.Identity())
    make_nothing.run_example(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), state)


class SizeNet(nn.Module):
    """Network from a batch or a list of images to the mean colour and size of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, images: Any) -> torch.Tensor:
        self.calls.append(len(images))
        each = [torch.cat([image.mean((1, 2)), torch.tensor([*map(float, image.shape[1:])])]) for image in images]
        return torch.stack(each)


def make_ragged(*sizes: tuple[int, int]) -> tuple[torch.Tensor, list[tuple[int, ...]], list[torch.Tensor]]:
    prediction = [torch.randint(0, 250, (3, *size), dtype=torch.uint8) for size in sizes]
    return (
        torch.cat([image.flatten() for image in prediction]),
        [tuple(image.shape) for image in prediction],
        prediction,
    )


@pytest.mark.parametrize(("input_kind", "calls"), [("batch", [2, 1, 1]), ("list", [4])])
def test_ragged_images_are_grouped_by_size_or_passed_as_list(input_kind: Any, calls: list[int]) -> None:
    module = SizeNet()
    flat, shapes, each = make_ragged((4, 6), (5, 5), (4, 6), (6, 4))
    predictor = Predictor(make_forward(module, input_kind=input_kind), IdentityPostprocess())
    outputs = embeddings(predictor(flat, shapes))
    assert module.calls == calls
    with torch.no_grad():
        expected = module([Normalizer(PREPROCESS)(image[None], torch.float32)[0] for image in each])
    torch.testing.assert_close(outputs, expected)


def test_ragged_batch_out_of_memory_is_halved() -> None:
    class LimitedSizeNet(SizeNet):
        def forward(self, images: Any) -> torch.Tensor:
            if len(images) > 2:
                raise OUT_OF_MEMORY[0]
            return super().forward(images)

    module = LimitedSizeNet()
    flat, shapes, each = make_ragged((4, 6), (5, 5), (3, 6), (6, 4), (1, 1))
    outputs = embeddings(Predictor(make_forward(module, input_kind="list"), IdentityPostprocess())(flat, shapes))
    assert outputs[:, 3:].tolist() == [[float(side) for side in image.shape[1:]] for image in each]


def test_fixed_batch_size_pads_short_batches() -> None:
    class FixedBatchNet(SmallNet):
        def forward(self, images: torch.Tensor) -> Any:
            assert len(images) == 4
            return super().forward(images)

    module, pixels = FixedBatchNet(), make_images(7)
    predictor = Predictor(make_forward(module), IdentityPostprocess(), fixed_batch_size=4)
    predictor.warm_up((8, 8))
    torch.testing.assert_close(embeddings(predictor(pixels)), plain_loop(module, pixels))
    torch.testing.assert_close(embeddings(predictor(pixels[:1])), plain_loop(module, pixels[:1]))


class LimitedNet(SmallNet):
    """Network that runs out of memory beyond `room` images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def forward(self, images: torch.Tensor) -> Any:
        if len(images) > self.room:
            raise OUT_OF_MEMORY[0]
        return super().forward(images)


@pytest.mark.parametrize(
    ("room", "start", "limit", "expected"),
    [(1000, 32, 256, 256), (100, 32, 256, 64), (80, 32, 256, 64), (79, 32, 256, 32), (9, 32, 256, 4), (1, 32, 64, 1)],
)
def test_largest_batch_leaves_a_quarter_of_memory(room: int, start: int, limit: int, expected: int) -> None:
    module = LimitedNet(room)
    assert make_predictor(module).find_largest_batch((8, 8), start, limit) == expected
    assert all(call[0] <= room for call in module.calls)


def test_warm_up_out_of_memory_is_halved() -> None:
    module, pixels = LimitedNet(5), make_images(32)
    predictor = make_predictor(module)
    predictor.warm_up((8, 8), rows=32)
    before = len(module.calls)
    torch.testing.assert_close(
        embeddings(predictor(pixels)), plain_loop(SmallNet(), pixels), check_device=False, rtol=9, atol=9
    )
    assert {call[0] for call in module.calls[before:]} == {4}, "later batches keep the size"


def test_preferred_batch_size_is_halved_when_memory_runs_out() -> None:
    module, pixels = LimitedNet(8), make_images(16)
    predictor = Predictor(make_forward(module), IdentityPostprocess(), preferred_batch_size=16)
    outputs = predictor(pixels)
    assert not outputs.errors
    assert len(embeddings(outputs)) == 16
    assert {call[0] for call in module.calls} == {8}
    assert embeddings(predictor(pixels[:3])).shape[0] == 3
    assert module.calls[-1][0] == 8, "short ones are padded to what fits"


def test_fixed_batch_size_out_of_memory_fails_the_attempt() -> None:
    with pytest.raises(AttemptFailed, match="a batch of 16, which is what the model takes"):
        Predictor(make_forward(LimitedNet(8)), IdentityPostprocess(), fixed_batch_size=16)(make_images(3))


def test_warm_up_reports_that_no_image_fits() -> None:
    with pytest.raises(InvalidJob, match="not even one image of 8x8 fits into the memory of cpu"):
        make_predictor(LimitedNet(0)).warm_up((8, 8), rows=8)


def test_model_too_large_for_device_is_reported() -> None:
    class HugeNet(SmallNet):
        def to(self, *_: Any, **__: Any) -> Any:
            raise OUT_OF_MEMORY[0]

    with pytest.raises(InvalidJob, match="model: it does not fit into the memory of cpu"):
        make_predictor(HugeNet())


def test_absent_device_is_never_replaced() -> None:
    assert pick_device("cpu") == CPU
    auto = pick_device("auto")
    assert auto.type == ("cuda" if torch.cuda.is_available() else auto.type)
    for name in ("gpu", "cuda:x", "tpu"):
        with pytest.raises(InvalidJob, match=r"runtime\.device"):
            pick_device(name)
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(InvalidJob, match=rf"runtime\.device: {absent} is not there"):
        pick_device(absent)


def test_precision_is_checked_against_the_device() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        check_precision(precision, CPU)
    with pytest.raises(InvalidJob, match=r"runtime\.precision: tf32 is for CUDA devices"):
        check_precision("tf32", CPU)
    outputs = get_device_capabilities(CPU)
    assert outputs.kind == "cpu"
    assert outputs.name.startswith("cpu ")


@pytest.mark.gpu
def test_each_precision_on_a_gpu() -> None:
    device = pick_device("cuda")
    assert get_device_capabilities(device).kind == "cuda"
    module, pixels = SmallNet().eval(), make_images(6).pin_memory()
    expected = plain_loop(module, pixels)
    before = torch.backends.cuda.matmul.fp32_precision
    for precision, tolerance in (("fp32", 1e-5), ("tf32", 1e-2), ("bf16", 0.1), ("fp16", 0.1)):
        predictor = Predictor(make_forward(module, precision, device=device), IdentityPostprocess())
        predictor.warm_up((8, 8))
        prediction = embeddings(predictor(pixels))
        assert prediction.device == CPU
        torch.testing.assert_close(prediction, expected, rtol=tolerance, atol=tolerance)
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_waiting_for_a_gpu_uses_no_cpu_time() -> None:
    class SlowNet(SmallNet):
        def forward(self, images: torch.Tensor) -> Any:
            torch.cuda._sleep(1_000_000_000)
            return super().forward(images)

    predictor = Predictor(make_forward(SlowNet().eval(), device=torch.device("cuda")), IdentityPostprocess())
    predictor.warm_up((8, 8))
    predicted = predictor(make_images(4))
    began, cpu = time.perf_counter(), time.thread_time()
    predicted.wait()
    assert time.thread_time() - cpu < 0.5 * (time.perf_counter() - began)


@pytest.mark.gpu
def test_full_gpu_memory_halves_batches() -> None:
    class HungryNet(SmallNet):
        def forward(self, images: torch.Tensor) -> Any:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(len(images) * total // 3, dtype=torch.uint8, device=images.device)
            return super().forward(images)

    module, pixels = HungryNet().eval(), make_images(8)
    prediction = Predictor(make_forward(module, device=torch.device("cuda")), IdentityPostprocess())(pixels)
    assert not prediction.errors
    assert max(call[0] for call in module.calls) == 2
