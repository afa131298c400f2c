"""The whole pipeline on a GPU: same bytes, nothing kept, and a clear answer where memory runs out."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trellis2.errors import Cancelled, CapacityError
from trellis2.options import GenerateOptions
from trellis2.pipeline import EMBEDDED_MODEL, PRESETS, Pipeline

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
PICTURE = Path(__file__).parents[1] / "assets" / "example_image" / "T.png"
STAGES = ["condition", "structure", "shape", "texture", "decode", "model", "video"]
MIB = 2**20


def options(pipeline_type: str = "512", **wishes: object) -> GenerateOptions:
    small = {"decimation_target": 100_000, "texture_size": 1024, "video_frames": 2, "video_resolution": 128}
    return GenerateOptions(pipeline_type=pipeline_type, return_no_background=True, **{**small, **wishes})


def digests(pipeline: Pipeline, folder: Path, wishes: GenerateOptions) -> dict[str, str]:
    pipeline.run(PICTURE, wishes, folder)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def held() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(EMBEDDED_MODEL, device=GPU, low_vram=False)


@pytest.fixture(scope="module")
def streamed() -> Pipeline:
    streamed = Pipeline.from_pretrained(EMBEDDED_MODEL, device=GPU, gpu_memory=8.0)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert not streamed.residency.resident_weights
    return streamed


@pytest.fixture
def hoard() -> Iterator[list[torch.Tensor]]:
    hoard: list[torch.Tensor] = []
    yield hoard
    hoard.clear()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("pipeline_type", list(PRESETS))
def test_same_request_same_bytes_wherever_weights_rest(
    pipeline: Pipeline, streamed: Pipeline, tmp_path: Path, pipeline_type: str
) -> None:
    first = digests(pipeline, tmp_path / "first", options(pipeline_type))
    assert len(first) == 3
    assert digests(pipeline, tmp_path / "second", options(pipeline_type)) == first
    assert digests(streamed, tmp_path / "streamed", options(pipeline_type)) == first


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["pipeline", "streamed"])
def test_cancelled_run_keeps_nothing(name: str, stage: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(name)
    digests(pipeline, tmp_path / "warm", options())
    before = held()

    def stop(at: str, step: int, steps: int, fraction: float) -> None:
        if at == stage and step > 0:
            raise Cancelled("stop")

    with pytest.raises(Cancelled) as caught:
        pipeline.run(PICTURE, options(), tmp_path / "cancelled", stop)
    # The caller still holds the error, and with it no tensors.
    assert held() <= before + MIB
    assert caught.value.args == ("stop",)


@pytest.mark.parametrize("stage", STAGES)
def test_full_memory_is_a_clear_answer_and_the_next_run_works(
    pipeline: Pipeline, tmp_path: Path, stage: str, hoard: list[torch.Tensor]
) -> None:
    expected = digests(pipeline, tmp_path / "before", options())
    before = held()

    def fill(at: str, step: int, steps: int, fraction: float) -> None:
        if at != stage or hoard:
            return
        torch.cuda.empty_cache()
        hoard.append(torch.empty(torch.cuda.mem_get_info()[0] // MIB * MIB * 9 // 10, dtype=torch.uint8, device=GPU))
        for size in (256 * MIB, 32 * MIB):
            # What counts as taken may still be given out: the driver empties the pools of others when it has to.
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                while True:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device=GPU))

    wishes = options("1024", texture_size=4096, video_resolution=1024)
    with pytest.raises(CapacityError, match=r"pipeline_type='1024', texture_size=4096; choose a smaller"):
        pipeline.run(PICTURE, wishes, tmp_path / "full", fill)
    hoard.clear()
    assert held() <= before + MIB
    assert digests(pipeline, tmp_path / "after", options()) == expected


def test_many_runs_leak_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    wishes = [options(), options("1024"), options(tex_slat_cfg=1.0), options(generate_video=False)]
    expected = [digests(pipeline, tmp_path / f"{i}", wish) for i, wish in enumerate(wishes)]
    memory, descriptors = held(), len(os.listdir("/proc/self/fd"))
    free = torch.cuda.mem_get_info()[0]
    for run in range(12):
        index = run % len(wishes)
        assert digests(pipeline, tmp_path / f"again{run}", wishes[index]) == expected[index]
    assert held() <= memory + MIB
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    assert torch.cuda.mem_get_info()[0] >= free - 64 * MIB
