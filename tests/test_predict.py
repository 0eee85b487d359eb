"""The forward pass: the plain loop's numbers, modes, precision, and memory that does not suffice."""

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


class Embedded:
    """The model's output as it is."""

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        assert torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
        return {"embedding": output}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
        self.seen: list[tuple[int, torch.dtype, bool, bool]] = []

    def forward(self, images: torch.Tensor) -> Any:
        out = self.layers(images)
        self.seen.append((len(images), out.dtype, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return out


class Cramped(Small):
    """Has room for so many images, and never for one whose first pixel is 255."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error = room, error

    def forward(self, images: torch.Tensor) -> Any:
        if len(images) > self.room or bool((images[:, 0, 0, 0] > 2.2).any()):
            self.seen.append((len(images), images.dtype, False, False))
            raise self.error
        return super().forward(images)


class NeedsVersions(Small):
    """Looks at what inference tensors do not have."""

    def forward(self, images: torch.Tensor) -> Any:
        assert images._version >= 0
        return super().forward(images)


class Broken(Small):
    def forward(self, images: torch.Tensor) -> Any:
        return images.flatten(1) @ images.flatten(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    yield
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    del state


def images(rows: int) -> torch.Tensor:
    return torch.randint(0, 250, (rows, 3, 8, 8), dtype=torch.uint8)


def forward(
    module: nn.Module, precision: Any = "fp32", grad_mode: Any = "inference", device: torch.device = CPU, **modes: Any
) -> ForwardPass:
    return ForwardPass(
        module.eval(),
        Normalizer(PREPROCESS),
        device,
        ForwardOptions(grad_mode, config=ExecutionConfig(precision=precision), **modes),
    )


def make(module: nn.Module, precision: Any = "fp32", grad_mode: Any = "inference") -> Predictor:
    return Predictor(forward(module, precision, grad_mode), Embedded())


def embedded(predicted: Prediction) -> torch.Tensor:
    """All rows that were predicted, in the batch's order."""
    found = {
        row: vector
        for piece in predicted.wait().outputs
        for row, vector in zip(piece.rows, piece.tensors["embedding"], strict=True)
    }
    return torch.stack([found[row] for row in sorted(found)])


def plain(module: Small, pixels: torch.Tensor) -> torch.Tensor:
    values = pixels.float() / 255
    mean, std = (torch.tensor(moments).view(3, 1, 1) for moments in (PREPROCESS.mean, PREPROCESS.std))
    with torch.no_grad():
        out: torch.Tensor = module.layers((values - mean) / std)
    return out


@pytest.mark.parametrize("grad_mode", ["inference", "no_grad"])
def test_the_numbers_are_those_of_a_plain_loop(grad_mode: Any) -> None:
    module, pixels = Small(), images(7)
    predictor = make(module, grad_mode=grad_mode)
    predictor.warm_up((8, 8))
    predictor.warm_up((3, 8, 8), rows=3)
    made = predictor(pixels)
    torch.testing.assert_close(embedded(made), plain(module, pixels), rtol=0, atol=0)
    assert not made.errors
    assert [seen[0] for seen in module.seen] == [2, 3, 7]
    assert {seen[2] for seen in module.seen} == {grad_mode == "inference"}
    assert {seen[3] for seen in module.seen} == {False}


def test_a_warm_up_tells_the_seconds_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def drawn(*given: Any) -> torch.Tensor:
        now[0] += 100.0
        return random_pixels(*given)

    class Slow(Small):
        def forward(self, images: torch.Tensor) -> Any:
            now[0] += 3.0
            return super().forward(images)

    monkeypatch.setattr("batchjob.inference.predictor.random_pixels", drawn)
    monkeypatch.setattr("batchjob.inference.predictor.time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert make(Slow()).warm_up((8, 8), rows=4) == 3.0
    assert now == [103.0]


def test_bf16_is_autocast_and_comes_back_as_float() -> None:
    module, pixels = Small(), images(3)
    made = make(module, "bf16")(pixels)
    assert module.seen[0][1] == torch.bfloat16
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert embedded(made).dtype == torch.float32
    torch.testing.assert_close(embedded(made), plain(module, pixels), rtol=0.05, atol=0.05)


def test_what_the_jobs_own_transform_made_goes_in_as_it_is() -> None:
    module, values = Small(), torch.rand(3, 3, 8, 8)
    as_it_is = Normalizer(Preprocess(transform="net:f"))
    predictor = Predictor(ForwardPass(module.eval(), as_it_is, CPU, ForwardOptions()), Embedded())
    predictor.warm_up((8, 8), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(embedded(predictor(values)), module.layers(values), rtol=0, atol=0)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_and_the_size_that_fits_is_kept(error: Exception) -> None:
    module, pixels = Cramped(3, error), images(10)
    predictor = make(module)
    made = predictor(pixels)
    torch.testing.assert_close(embedded(made), plain(module, pixels))
    assert not made.errors
    assert [seen[0] for seen in module.seen] == [10, 5, 2, 2, 2, 2, 2]
    module.seen.clear()
    predictor(pixels[:4])
    assert [seen[0] for seen in module.seen] == [2, 2]
    module.room = 100
    for _ in range(100):
        predictor(pixels[:4])
    module.seen.clear()
    predictor(pixels[:4])
    assert [seen[0] for seen in module.seen] == [4], "after a calm while larger pieces are tried again"


def test_an_image_that_alone_does_not_fit_is_a_fault_and_the_others_are_predicted() -> None:
    module, pixels = Cramped(100, OUT_OF_MEMORY[0]), images(9)
    pixels[4, 0, 0, 0] = 255
    predictor = make(module)
    made = predictor(pixels)
    assert {row: fault.type for row, fault in made.errors.items()} == {4: "memory"}
    good = [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(embedded(made), plain(module, pixels)[good])
    module.seen.clear()
    predictor(images(9))
    assert [seen[0] for seen in module.seen] == [9], "that was the image's fault, not the batch size's"
    assert predictor(pixels[4:5]).errors.keys() == {0}


def test_one_image_of_a_batch_is_predicted_by_itself() -> None:
    module, pixels = Cramped(100, OUT_OF_MEMORY[0]), images(4)
    pixels[2, 0, 0, 0] = 255
    predictor = make(module)
    alone = [predictor.predict_single(pixels, None, row) for row in range(4)]
    assert [piece.rows for made in alone for piece in made.outputs] == [(0,), (1,), (3,)]
    assert [list(made.errors) for made in alone] == [[], [], [2], []]
    found = torch.cat([made.outputs[0].tensors["embedding"] for made in alone if made.outputs])
    torch.testing.assert_close(found, plain(module, pixels)[[0, 1, 3]])


def test_memory_that_is_gone_is_no_fault_of_the_images() -> None:
    predictor = make(Cramped(0, OUT_OF_MEMORY[0]))
    with pytest.raises(AttemptFailed, match="not even one image fits into the memory of cpu"):
        predictor(images(3))


def test_another_error_of_the_model_is_raised_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        make(Broken())(images(3))


def test_a_model_that_inference_mode_breaks_is_told_what_to_write() -> None:
    with pytest.raises(InvalidJob, match=r"runtime\.grad_mode: no_grad") as caught:
        make(NeedsVersions()).warm_up((8, 8))
    assert "Inference tensors do not track version counter" in caught.value.message
    predictor = make(NeedsVersions(), grad_mode="no_grad")
    predictor.warm_up((8, 8))
    assert len(embedded(predictor(images(2)))) == 2


def test_a_model_that_fails_anyway_is_told_with_its_words() -> None:
    for grad_mode in ("inference", "no_grad"):
        with pytest.raises(InvalidJob, match=r"example batch of shape 2x3x8x8 on cpu: RuntimeError: .*mat1 and mat2"):
            make(Broken(), grad_mode=grad_mode).warm_up((8, 8))


def test_an_example_shows_the_output_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert forward(Small()).run_example(images(2)).shape == (2, 5)
    make(Small()).warm_up((8, 8))
    state = torch.get_rng_state()
    make_nothing = forward(nn.Identity())
    make_nothing.run_example(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), state)


class Sizes(nn.Module):
    """Mean colour and size of each image, of a batch or of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, images: Any) -> torch.Tensor:
        self.calls.append(len(images))
        each = [torch.cat([image.mean((1, 2)), torch.tensor([*map(float, image.shape[1:])])]) for image in images]
        return torch.stack(each)


def ragged(*sizes: tuple[int, int]) -> tuple[torch.Tensor, list[tuple[int, ...]], list[torch.Tensor]]:
    made = [torch.randint(0, 250, (3, *size), dtype=torch.uint8) for size in sizes]
    return torch.cat([image.flatten() for image in made]), [tuple(image.shape) for image in made], made


@pytest.mark.parametrize(("takes", "calls"), [("batch", [2, 1, 1]), ("list", [4])])
def test_images_of_different_sizes_are_predicted_by_size_or_as_a_list(takes: Any, calls: list[int]) -> None:
    module = Sizes()
    flat, shapes, each = ragged((4, 6), (5, 5), (4, 6), (6, 4))
    predictor = Predictor(forward(module, input_kind=takes), Embedded())
    found = embedded(predictor(flat, shapes))
    assert module.calls == calls
    with torch.no_grad():
        wanted = module([Normalizer(PREPROCESS)(image[None], torch.float32)[0] for image in each])
    torch.testing.assert_close(found, wanted)


def test_images_of_different_sizes_that_do_not_fit_are_halved_too() -> None:
    class Narrow(Sizes):
        def forward(self, images: Any) -> torch.Tensor:
            if len(images) > 2:
                raise OUT_OF_MEMORY[0]
            return super().forward(images)

    module = Narrow()
    flat, shapes, each = ragged((4, 6), (5, 5), (3, 6), (6, 4), (1, 1))
    found = embedded(Predictor(forward(module, input_kind="list"), Embedded())(flat, shapes))
    assert found[:, 3:].tolist() == [[float(side) for side in image.shape[1:]] for image in each]


def test_a_model_that_takes_just_one_batch_size_gets_short_ones_padded() -> None:
    class Strict(Small):
        def forward(self, images: torch.Tensor) -> Any:
            assert len(images) == 4
            return super().forward(images)

    module, pixels = Strict(), images(7)
    predictor = Predictor(forward(module), Embedded(), fixed_batch_size=4)
    predictor.warm_up((8, 8))
    torch.testing.assert_close(embedded(predictor(pixels)), plain(module, pixels))
    torch.testing.assert_close(embedded(predictor(pixels[:1])), plain(module, pixels[:1]))


class Limited(Small):
    """A device with memory for so many images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def forward(self, images: torch.Tensor) -> Any:
        if len(images) > self.room:
            raise OUT_OF_MEMORY[0]
        return super().forward(images)


@pytest.mark.parametrize(
    ("room", "first", "most", "found"),
    [(1000, 32, 256, 256), (100, 32, 256, 64), (80, 32, 256, 64), (79, 32, 256, 32), (9, 32, 256, 4), (1, 32, 64, 1)],
)
def test_the_largest_batch_leaves_a_quarter_to_spare(room: int, first: int, most: int, found: int) -> None:
    module = Limited(room)
    assert make(module).find_largest_batch((8, 8), first, most) == found
    assert all(seen[0] <= room for seen in module.seen)


def test_a_warm_up_that_does_not_fit_is_halved_like_any_batch() -> None:
    module, pixels = Limited(5), images(32)
    predictor = make(module)
    predictor.warm_up((8, 8), rows=32)
    before = len(module.seen)
    torch.testing.assert_close(embedded(predictor(pixels)), plain(Small(), pixels), check_device=False, rtol=9, atol=9)
    assert {seen[0] for seen in module.seen[before:]} == {4}, "it has learned what fits"


def test_a_compiled_module_that_gets_no_more_memory_is_halved_too() -> None:
    module, pixels = Limited(8), images(16)
    predictor = Predictor(forward(module), Embedded(), preferred_batch_size=16)
    found = predictor(pixels)
    assert not found.errors
    assert len(embedded(found)) == 16
    assert {seen[0] for seen in module.seen} == {8}
    assert embedded(predictor(pixels[:3])).shape[0] == 3
    assert module.seen[-1][0] == 8, "short ones are padded to what fits"


def test_a_model_of_one_batch_size_that_does_not_fit_loses_no_image() -> None:
    with pytest.raises(AttemptFailed, match="a batch of 16, which is what the model takes"):
        Predictor(forward(Limited(8)), Embedded(), fixed_batch_size=16)(images(3))


def test_not_even_one_image_is_said_before_work() -> None:
    with pytest.raises(InvalidJob, match="not even one image of 8x8 fits into the memory of cpu"):
        make(Limited(0)).warm_up((8, 8), rows=8)


def test_a_model_that_does_not_fit_onto_the_device_is_said_before_work() -> None:
    class Huge(Small):
        def to(self, *_: Any, **__: Any) -> Any:
            raise OUT_OF_MEMORY[0]

    with pytest.raises(InvalidJob, match="model: it does not fit into the memory of cpu"):
        make(Huge())


def test_devices_are_never_replaced() -> None:
    assert pick_device("cpu") == CPU
    auto = pick_device("auto")
    assert auto.type == ("cuda" if torch.cuda.is_available() else auto.type)
    for name in ("gpu", "cuda:x", "tpu"):
        with pytest.raises(InvalidJob, match=r"runtime\.device"):
            pick_device(name)
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(InvalidJob, match=rf"runtime\.device: {absent} is not there"):
        pick_device(absent)


def test_precision_follows_the_device() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        check_precision(precision, CPU)
    with pytest.raises(InvalidJob, match=r"runtime\.precision: tf32 is for CUDA devices"):
        check_precision("tf32", CPU)
    found = get_device_capabilities(CPU)
    assert found.kind == "cpu"
    assert found.name.startswith("cpu ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu() -> None:
    device = pick_device("cuda")
    assert get_device_capabilities(device).kind == "cuda"
    module, pixels = Small().eval(), images(6).pin_memory()
    expected = plain(module, pixels)
    before = torch.backends.cuda.matmul.fp32_precision
    for precision, tolerance in (("fp32", 1e-5), ("tf32", 1e-2), ("bf16", 0.1), ("fp16", 0.1)):
        predictor = Predictor(forward(module, precision, device=device), Embedded())
        predictor.warm_up((8, 8))
        made = embedded(predictor(pixels))
        assert made.device == CPU
        torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance)
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_wait_for_a_gpu_holds_no_core() -> None:
    class Slow(Small):
        def forward(self, images: torch.Tensor) -> Any:
            torch.cuda._sleep(1_000_000_000)
            return super().forward(images)

    predictor = Predictor(forward(Slow().eval(), device=torch.device("cuda")), Embedded())
    predictor.warm_up((8, 8))
    predicted = predictor(images(4))
    began, cpu = time.perf_counter(), time.thread_time()
    predicted.wait()
    assert time.thread_time() - cpu < 0.5 * (time.perf_counter() - began)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_that_is_really_full_is_met_with_smaller_batches() -> None:
    class Hungry(Small):
        def forward(self, images: torch.Tensor) -> Any:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(len(images) * total // 3, dtype=torch.uint8, device=images.device)
            return super().forward(images)

    module, pixels = Hungry().eval(), images(8)
    made = Predictor(forward(module, device=torch.device("cuda")), Embedded())(pixels)
    assert not made.errors
    assert max(seen[0] for seen in module.seen) == 2
