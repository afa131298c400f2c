"""The benchmarks measure what they say: counts by hand, the scene's surface, a whole run at toy size, the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from o_voxel.dual_grid import flexible_dual_grid_to_mesh

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not installed

from benchmarks import __main__ as benchmark
from benchmarks import leaks, models, original, report, serving
from benchmarks import o_voxel as conversions
from benchmarks.forced import forced, reduced
from benchmarks.measure import GIB, Gauge, Stopwatch
from benchmarks.ours import floor
from benchmarks.scene import Scene, Subdivision, distance
from trellis2.checkpoint import build_model
from trellis2.options import GenerateOptions
from trellis2.pipeline import PRESETS, Pipeline
from trellis2.sampling import SamplerOptions, euler
from trellis2.voxels import Grid

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(64, CPU)


def test_flops_of_one_evaluation_by_hand() -> None:
    args = {"model_channels": 2, "mlp_ratio": 2.0, "cond_channels": 5, "num_blocks": 10}
    # 3 tokens of 2 channels, 4 image tokens of 5: q, k, v and out 3*2*8 multiplications, scores and mixing 2*3*3*2;
    # across: q and out 3*2*4, k and v 4*5*4, scores and mixing 2*3*4*2; MLP 2 * 3*2*4.  Two operations each.
    assert models.flow_flops(3, 4, args) == 10 * 2 * ((48 + 36) + (24 + 80 + 48) + 48)


@pytest.mark.parametrize(
    ("tokens", "image_tokens", "teraflop"),
    [(4096, 1029, 13.7), (2358, 1029, 7.2), (9684, 4101, 48.2), (21902, 4101, 157.4)],
)
def test_flops_at_the_published_size(tokens: int, image_tokens: int, teraflop: float) -> None:
    args = models.configurations()["shape_slat_flow_model_1024"][1]
    assert models.flow_flops(tokens, image_tokens, args) / 1e12 == pytest.approx(teraflop, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "cfg", "count"),
    [("sparse_structure", 7.5, 22), ("shape_slat", 7.5, 21), ("tex_slat", 7.5, 18), ("tex_slat", 1.0, 12)],
)
def test_evaluations_are_those_of_the_sampler(stage: str, cfg: float, count: int) -> None:
    calls = []

    def velocity(x: torch.Tensor, t: torch.Tensor, conditional: bool) -> torch.Tensor:
        calls.append(t)
        return torch.full_like(x, float(conditional))

    options = SamplerOptions(**{**models.SAMPLERS[stage], "guidance_strength": cfg})
    for _ in euler(velocity, torch.randn(4, 2), (4,), options):
        pass
    assert len(calls) == count == models.evaluations(stage, cfg)


def test_floor_counts_every_flow_once() -> None:
    tokens = {"coarse": 2358, "fine": 9684}
    with_cascade = floor(tokens, GenerateOptions(pipeline_type="1024_cascade"), 1e15, small=False)
    without = floor(tokens, GenerateOptions(pipeline_type="1024"), 1e15, small=False)
    # 22 * 13.73 + (21 + 18) * 48.23 TFLOP, and 21 * 7.23 for the coarse shape
    assert without["floor_seconds"] == pytest.approx(2.183, abs=0.002)
    assert with_cascade["floor_seconds"] - without["floor_seconds"] == pytest.approx(0.1518, abs=0.0005)


def test_published_sizes() -> None:
    counts = {
        name: sum(p.numel() for p in build_model(kind, args).parameters())
        for name, (kind, args) in models.configurations().items()
    }
    assert counts["shape_slat_flow_model_512"] / 1e9 == pytest.approx(1.29, abs=0.005)
    assert counts["shape_slat_decoder"] / 1e6 == pytest.approx(474, abs=1)
    assert counts["sparse_structure_decoder"] / 1e6 == pytest.approx(74, abs=0.5)


def test_random_weights_are_neither_zero_nor_huge() -> None:
    checkpoint = models.random_checkpoint(CPU, small=True)
    for model in (*checkpoint.models.values(), checkpoint.image_encoder):
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all(), name
            assert parameter.abs().max() < 10, name
    for model in checkpoint.models.values():
        assert all(p.abs().max() > 0 for p in model.parameters())


def test_counts_of_tokens_and_voxels_are_those_of_a_real_asset() -> None:
    scene = Scene(384, CPU)
    assert len(scene.grid(96)) == pytest.approx(21902, rel=0.03)
    assert len(scene.grid(384)) == pytest.approx(2.51e6 * (384 / 1024) ** 2, rel=0.03)
    assert len(scene.grid(64)) == pytest.approx(9684, rel=0.03)
    assert len(scene.grid(32)) == pytest.approx(2358, rel=0.03)


def test_surface_is_closed(scene: Scene) -> None:
    coords = scene.ordered(4, 64)
    fields = scene.fields(4)
    split = torch.ones(len(coords), 1)
    vertices, faces = flexible_dual_grid_to_mesh(
        coords, fields.offsets.float(), fields.crossed, split, [[-0.5] * 3, [0.5] * 3], grid_size=64
    )
    ends = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(dim=1).values
    _, count = ends.unique(dim=0, return_counts=True)
    assert set(count.tolist()) == {2, 4}
    # Two sheets of the surface meet in an edge where the signs at the corners of a voxel's face alternate.
    lattice = torch.cartesian_prod(*[torch.arange(65, dtype=torch.float64)] * 3) / 64 - 0.5
    inside = (distance(lattice) < 0).view(65, 65, 65)
    touching = 0
    for turned in (inside, inside.permute(1, 2, 0), inside.permute(2, 0, 1)):
        a, b, c, d = turned[:, :-1, :-1], turned[:, 1:, :-1], turned[:, :-1, 1:], turned[:, 1:, 1:]
        touching += int(((a == d) & (b == c) & (a != b)).sum())
    assert int((count == 4).sum()) == touching
    assert len(faces) == 2 * int(fields.crossed.sum())  # no quad lacks a voxel
    # Every vertex lies near the surface, which is where the distance is zero.
    assert distance(vertices.double()).abs().max() < 1 / 64


def test_subdivisions_lead_to_the_finest_voxels(scene: Scene) -> None:
    coords = scene.grid(4)
    following = Subdivision(scene, 4)
    grid = Grid(torch.nn.functional.pad(coords, (1, 0)))
    for side in (8, 16, 32, 64):
        grid = grid.subdivide(following.next()).fine
        assert sorted(grid.coords[:, 1:].tolist()) == scene.grid(side).tolist()
    assert torch.equal(grid.coords[:, 1:], scene.ordered(4, 64))


def test_forcing_ends_with_its_block(scene: Scene) -> None:
    import trellis2.pipeline

    before = (Pipeline.decode_shape, Grid.subdivide, trellis2.pipeline.dual_grid_fields)
    with reduced(), forced(scene, PRESETS["512"]):
        assert Grid.subdivide is not before[1]
    assert (Pipeline.decode_shape, Grid.subdivide, trellis2.pipeline.dual_grid_fields) == before
    assert PRESETS["512"].resolution == 512


def test_whole_benchmark_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    common = ["--small", "--device", "cpu", "--repeats", "1", "--json", str(path)]
    assert benchmark.main([*common, "--presets", "512", "--stages"]) == 0
    assert benchmark.main([*common, "--presets", "1536_cascade", "--stages", "--no-files"]) == 0
    results = json.loads(path.read_text())
    assert results["machine"]["device"] == "CPU"
    small, large = results["runs"]
    assert (small["preset"], large["preset"]) == ("512", "1536_cascade")
    assert small["tokens"] == {"coarse": 40, "fine": 40}
    assert large["tokens"]["fine"] > 5 * large["tokens"]["coarse"]
    assert small["faces"] == small["model"]["triangles"]  # too few to simplify
    assert small["video"]["frames"] == 2
    assert large["voxels"] == len(Scene(192, CPU).grid(192))
    assert {*report.STAGES} - {"condition 1024", "coarse shape flow", "upsample"} < {*small["stages"]}
    assert {"coarse shape flow", "upsample", "texture flow, cfg 7.5"} < {*large["stages"]}
    assert small["bake_steps"]["unwrap"]["median"] > 0
    assert sum(s["median"] for s in small["bake_steps"].values()) <= small["stages"]["bake"]["median"]
    assert "bake" not in large["stages"]
    out = capsys.readouterr().out
    assert "ours 512, weights resident" in out
    assert "coarse shape flow" in out


def test_worker_of_a_service_at_toy_size(tmp_path: Path) -> None:
    serving.write_checkpoint(tmp_path, torch.device("cpu"), small=True)
    options = argparse.Namespace(folder=tmp_path, small=True)
    output, _ = serving._start(options, 0).communicate("", timeout=300)
    ready, seconds = map(json.loads, output.splitlines())
    assert ready["ready"] > 0
    assert {preset: len(runs) for preset, runs in seconds.items()} == {serving.UNSEEN: 1}


def test_repeated_run_takes_the_place_of_the_former_one(tmp_path: Path) -> None:
    path, results = tmp_path / "results.json", {"machine": {}, "runs": []}
    first = {"implementation": "ours", "preset": "512", "residency": "resident", "cap_gib": None, "seconds": 1}
    benchmark._merge(path, results, {"device": "A"}, [first, {**first, "cap_gib": 4.0}])
    benchmark._merge(path, results, {"device": "B"}, [{**first, "seconds": 2}])
    assert json.loads(path.read_text()) == results
    assert results["machine"] == {"device": "B"}
    assert [(run["cap_gib"], run["seconds"]) for run in results["runs"]] == [(None, 2), (4.0, 1)]


def test_failure_is_reported_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr("trellis2.pipeline.Pipeline.sample_texture", fail)
    path = tmp_path / "results.json"
    arguments = ["--small", "--device", "cpu", "--repeats", "1", "--no-files", "--presets", "512", "1024"]
    assert benchmark.main([*arguments, "--json", str(path)]) == 1
    assert [run["error"] for run in json.loads(path.read_text())["runs"]] == ["RuntimeError: no luck"] * 2
    assert "FAILED: RuntimeError: no luck" in capsys.readouterr().out


def test_stopwatch_gives_nested_time_to_the_outer_call() -> None:
    watch = Stopwatch()
    watch.new_round()
    inner = watch.wrap("inner", lambda: 1)
    outer = watch.wrap("outer", lambda: inner() + 1)
    assert outer() == 2
    assert list(watch.summary()) == ["outer"]
    inner()
    assert list(watch.summary()) == ["outer", "inner"]


def test_gauge_gives_the_peak_above_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(5 * GIB, "NVML"), (9 * GIB, "NVML"), (6 * GIB, "NVML")])
    done = threading.Event()

    def device_used() -> tuple[int, str] | None:
        reading = next(readings, None)
        if reading is None:
            done.set()
        return reading

    monkeypatch.setattr("benchmarks.measure.device_used", device_used)
    with Gauge(2 * GIB) as gauge:
        assert done.wait(10)
    assert gauge.report()["peak_device_gib"] == 7
    assert gauge.report()["device_memory_by"] == "NVML, device in use less 2.00 GiB at the start"


def test_conversions_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    small = ["--device", "cpu", "--resolution", "64", "--faces", "5000", "--texture", "32", "--repeat", "1"]
    assert conversions.main([*small, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "mesh -> attributes" in said
    results = json.loads(file.read_text())["results"]
    assert 4000 < results["faces"] < 6000
    assert {"mesh -> dual grid", "mesh -> attributes", "dual grid -> mesh"} <= set(results["seconds"])
    assert results["round_trip"]["f"] == 1.0
    assert 20 < results["round_trip"]["psnr"] < 60


def test_the_ball_is_closed_but_for_its_seam() -> None:
    ball = conversions.textured_ball(2000, 32)
    assert len(ball.faces) == pytest.approx(2000, rel=0.1)
    ball.merge_vertices(merge_tex=True, merge_norm=True)
    assert ball.is_watertight
    assert ball.volume > 0  # faces look outwards


def test_original_is_refused_where_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(original=str(tmp_path), residency="auto")
    assert original.run(options, lambda *_: None) == 2
    assert "no checkout of the original" in capsys.readouterr().out


def test_what_the_original_has_measured_is_kept_while_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker:
        """Writes what it has twice, and ends with the second."""

        def __init__(self, command: list[str], **_: object) -> None:
            self.out, self.parts = Path(json.loads(command[-1])["out"]), 0

        def wait(self, timeout: float) -> int:
            self.parts += 1
            self.out.write_text(json.dumps({"machine": {}, "runs": ["run"] * self.parts}))
            if self.parts == 1:
                raise subprocess.TimeoutExpired("worker", timeout)
            return 3

    (tmp_path / "trellis2" / "pipelines").mkdir(parents=True)
    options = argparse.Namespace(
        original=str(tmp_path), residency="auto", cap=None, presets=[], repeats=1, no_files=False, keep_files=None
    )
    merged: list[object] = []
    monkeypatch.setattr(original.subprocess, "Popen", Worker)
    assert original.run(options, lambda _, runs: merged.append(runs)) == 3
    assert merged == [["run"], ["run", "run"]]


@pytest.fixture
def steady() -> Iterator[list[leaks.State]]:
    mib = leaks.MIB
    return [leaks.State(leaks.request(i, ["512", "1024"]), 0, 900 * mib, 700 * mib, 6, ("a", "b")) for i in range(24)]


def test_leaks_are_told_from_caches_that_fill(steady: list[leaks.State]) -> None:
    assert leaks.problems(steady) == []
    warm = [dataclasses.replace(s, allocated=100 * min(i, 3)) for i, s in enumerate(steady)]
    assert leaks.problems(warm) == []
    for name, step in (("allocated", 512), ("device", 4 * leaks.MIB), ("host", 40 * leaks.MIB), ("descriptors", 1)):
        growing = [dataclasses.replace(s, **{name: getattr(s, name) + i * step}) for i, s in enumerate(steady)]
        (problem,) = leaks.problems(growing)
        assert problem.startswith(f"{name} grew")


def test_different_files_for_one_request_are_a_failure(steady: list[leaks.State]) -> None:
    steady[20] = dataclasses.replace(steady[20], files=("a", "c"))
    (problem,) = leaks.problems(steady)
    assert problem == f"512 with seed {steady[20].request[1]} gave 2 different results."


def run(implementation: str, residency: str, seconds: float, **extra: object) -> dict[str, object]:
    stages = {name: {"median": seconds / 10} for name in ("structure flow", "shape flow", "texture flow, cfg 7.5")}
    return {
        "implementation": implementation,
        "preset": "512",
        "residency": residency,
        "cap_gib": None,
        "run": "image to asset",
        "run_seconds": {"median": seconds},
        "peak_device_gib": 17.7,
        "tokens": {"coarse": 2350, "fine": 2350},
        "voxels": 631545,
        "stages": stages,
        **extra,
    }


def sample_results() -> dict[str, object]:
    machine = {"device": "H100", "torch": "2.11.0", "date": "2026-11-24", "matmul_teraflops": 784.5}
    parts = {"run": "image to files", "run_parts": {"shape": {"median": 1.5}, "model": {"median": 4.0}}}
    files = {name: {"median": 10.0} for name in ("bake", "write GLB", "video")}
    theirs = run("original", "resident", 3.5, deviations=["no flash_attn"])
    theirs["stages"] = {**theirs["stages"], **files}  # type: ignore[dict-item]
    capped = {"cap_gib": 4.0, "within_cap": True, "floor_seconds": 0.5}
    return {
        "machine": machine,
        "start": {
            "ready_seconds": {"median": 9.96},
            "512": {"first_seconds": {"median": 4.1}, "warm_seconds": {"median": 4.0}},
        },
        "throughput": {
            "preset": "512",
            "gpus": 2,
            "assets_a_minute": {"one": 7.5, "all": 14.0},
            "share_of_ideal": 14 / 15,
        },
        "runs": [
            run("ours", "resident", 6.0, floor_seconds=0.6, **parts),
            run("ours", "streamed", 2.0, floor_seconds=0.6),
            theirs,
            run("ours", "streamed", 2.5, **capped),
            {**run("ours", "streamed", 2.5, **capped), "preset": "1024", "error": "CapacityError: full"},
        ],
    }


def test_report_of_a_sample() -> None:
    lines = report.section(sample_results()).splitlines()  # type: ignore[arg-type]
    assert "| `512` | 2,350 | 0.63 M | 1.5 s | 3.5 s | 6.0 s | 33.5 s | 0.60 s | 3.0 |" in lines
    assert "| shape flow | 600 / 350 |" in lines
    assert "| bake | - / 10,000 |" in lines
    assert "| `512` | 1.5 s, 17.7 GiB | 3.5 s, 17.7 GiB | 2.0 s, 17.7 GiB | - |" in lines
    assert "| ours | `512` | 4 GiB | yes | 17.70 GiB | image to asset, 2.5 s |" in lines
    assert "| ours | `1024` | 4 GiB | no: CapacityError | - | - |" in lines
    assert any("no flash_attn" in line for line in lines)
    assert any("is ready 10.0 s after" in line and "4.1 s (`512`; the same again: 4.0 s)." in line for line in lines)
    assert any(
        line.endswith("14.0 assets a minute (`512`, GLB and video), one alone 7.5: 93% of the ideal.") for line in lines
    )


def test_section_is_written_between_the_markers(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    results.write_text(json.dumps(sample_results()))
    readme.write_text("before\n")
    with pytest.raises(ValueError, match="has no lines"):
        report.write_section(readme, results)
    readme.write_text(f"before\n{report.START}old\n{report.END}\nafter\n")
    report.write_section(readme, results)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.START}H100")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text


def test_readme_tells_the_committed_results() -> None:
    text = report.README.read_text()
    told = text[text.index(report.START) + len(report.START) : text.index(report.END)]
    assert told == report.section(json.loads(report.RESULTS.read_text()))
