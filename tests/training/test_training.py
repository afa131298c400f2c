"""Each trainer at toy size: learns one batch, goes on where it stopped, is the same in two processes, and exports."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import training.data
import training.train
import trellis2.pipeline
from tests.training import toys
from training.data import COARSE, build, collate, draw_view, join
from training.encode import Encoders, encode
from training.export import RUNS, VOXEL_BIAS, export, mean_of
from training.losses import decode_guided
from training.objects import Thing, make
from training.optim import MuonAdamW
from training.train import Batches, Pool, Run, main, read_average
from training.trainers import Latents, build_networks
from trellis2.options import GenerateOptions
from trellis2.pipeline import Pipeline
from trellis2.voxels import Grid, Voxels

ROOT = Path(__file__).resolve().parents[2]
VAES = ("structure_vae", "shape_vae", "texture_vae")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    with torch.enable_grad():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_objects(tmp_path_factory.mktemp("objects") / "npz")


@pytest.fixture(scope="session")
def vaes(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Averages of the three VAEs after two steps."""
    folder = tmp_path_factory.mktemp("vaes")
    for name in VAES:
        with torch.enable_grad():
            steps(started(toys.config(name), objects), 2).save_average(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def latents(objects: Path, vaes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    encode(
        argparse.Namespace(data=objects, vae=vaes, out=folder, statistics=4, once=True, remove=False, minutes=None), CPU
    )
    return folder


def test_new_voxel_networks_tell_colours_apart() -> None:
    """What an untrained encoder says of an object depends on its colour as much as on the place, and not a decoder on
    the place alone: training starts from there instead of looking for it."""
    networks = build_networks(json.loads((toys.CONFIGS / "texture_vae.json").read_text())["models"], 0)
    batch = collate(join([build("mushroom", 0, 64)]))
    coarse = batch.steps[0].coarse
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(8, 6, generator=generator) * 2 - 1
    latents = torch.randn(8, 16, generator=generator)
    with torch.no_grad():
        means = [networks["encoder"](Voxels(c.repeat(len(batch.grid), 1), batch.grid))[0].feats for c in colors]
        decoded = [
            decode_guided(networks["decoder"], Voxels(z.repeat(len(coarse), 1), coarse), batch.steps)[0]
            for z in latents
        ]
    for values, least in ((means, 0.5), (decoded, 0.1)):
        rows = torch.stack(values)
        assert rows.mean(1).var(0).sum() > least * rows.var(1).mean(0).sum()


def started(config: dict[str, object], data: Path) -> Run:
    return Run(config, data, CPU)


def steps(run: Run, count: int) -> Run:
    losses_of(run, count)
    return run


def losses_of(run: Run, count: int) -> list[float]:
    return [float(terms["loss"]) for terms in terms_of(run, count)]


def terms_of(run: Run, count: int) -> list[dict[str, torch.Tensor]]:
    batches = Batches(run, Pool(run.data, run.objective.load, run.shards(), 100, len(toys.OBJECTS)))
    terms = [run.train_step(next(batches)) for _ in range(count)]
    batches.close()
    return terms


def folder_of(name: str, objects: Path, latents: Path) -> Path:
    return latents if name == "flows" else objects


@pytest.mark.parametrize(
    ("name", "count", "share"),
    [("structure_vae", 60, 0.35), ("shape_vae", 40, 0.45), ("texture_vae", 40, 0.2), ("flows", 60, 0.6)],
)
def test_learns_one_batch(name: str, count: int, share: float, objects: Path, latents: Path) -> None:
    """The loss falls to ``share`` of what it was, on objects that are always the same."""
    config = toys.config(name)
    if config["trainer"]["args"]["optimizer"]["name"] == "AdamW":
        config["trainer"]["args"]["optimizer"]["args"]["lr"] = 4e-3
    losses = losses_of(started(config, folder_of(name, objects, latents)), count)
    assert sum(losses[-5:]) / 5 < share * losses[0]


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_loss_type_of_materials(kind: str, objects: Path) -> None:
    config = toys.config("texture_vae")
    config["trainer"]["args"].update(loss_type=kind, lambda_coarse=0.0, lambda_kl=0.0)
    (terms,) = terms_of(started(config, objects), 1)
    assert float(terms["loss"]) == float(terms[kind]) > 0


def test_starts_from_published_files(latents: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    """finetune_ckpt names the file of a network, with the keys that it is published with."""
    config = toys.config("flows")
    config["models"] = {"denoiser": config["models"]["shape"]}
    encoder = {"model_name": str(checkpoint_folder / "dinov3"), "image_size": 64}
    config["models"]["denoiser"]["args"]["cond_channels"] = 16
    config["trainer"]["name"] = "ImageConditionedSparseFlowMatchingCFGTrainer"
    del config["trainer"]["args"]["lambda_maps"]
    config["trainer"]["args"].update(
        t_schedule={"name": "uniform", "args": {}},
        image_cond_model={"name": "DinoV3FeatureExtractor", "args": encoder},
    )
    table = json.loads((latents / "normalization.json").read_text())
    config["dataset"] = {"name": "ImageConditionedSLatShape", "args": {"normalization": table["shape"]}}
    first = steps(started(config, latents), 2)
    state = {key.removeprefix("shape."): value for key, value in first.masters.state_dict().items()}
    save_file(state, tmp_path / "flow.safetensors")
    second = started(config, latents)
    second.load_networks({"denoiser": str(tmp_path / "flow.safetensors")})
    assert torch.equal(second.objective.models["shape"].input_layer.weight, state["input_layer.weight"])
    assert torch.isfinite(torch.tensor(losses_of(second, 1))).all()
    state.pop("input_layer.bias")
    save_file(state, tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match=r"input_layer\.bias is missing"):
        second.load_networks({"denoiser": str(tmp_path / "flow.safetensors")})


@pytest.mark.parametrize("name", ["shape_vae", "flows"])
def test_goes_on_bit_for_bit(name: str, objects: Path, latents: Path, tmp_path: Path) -> None:
    data = folder_of(name, objects, latents)
    whole = losses_of(started(toys.config(name), data), 4)
    first = started(toys.config(name), data)
    assert losses_of(first, 2) == whole[:2]
    first.save_state(tmp_path / "state.pt")
    second = started(toys.config(name, seed=0), data)
    second.load_state(tmp_path / "state.pt")
    assert losses_of(second, 2) == whole[2:]


def test_goes_on_from_averages(objects: Path, tmp_path: Path) -> None:
    """In half precision: the same loss up to its rounding, and the step count goes on."""
    run = steps(started(toys.config("texture_vae"), objects), 12)
    run.save_average(tmp_path / "a.safetensors")
    again = started(toys.config("texture_vae"), objects)
    fresh = losses_of(started(toys.config("texture_vae"), objects), 1)[0]
    again.load_average(tmp_path / "a.safetensors")
    assert again.step == 12
    loss = losses_of(again, 1)[0]
    for name, value in run.average.values.items():
        assert torch.allclose(read_average(tmp_path / "a.safetensors")[0][name], value, rtol=1e-3, atol=1e-6)
    assert loss < 0.7 * fresh


def test_halves_of_a_batch_add_up(objects: Path) -> None:
    """Two processes get the gradients of one, because terms are means over objects: here by accumulation."""
    averages = []
    for split in (1, 2):
        config = linear(toys.config("shape_vae", batch_split=split))
        averages.append(steps(started(config, objects), 1).average.values)
    fresh = started(toys.config("shape_vae"), objects).average.values
    assert max(float((fresh[key] - value).abs().max()) for key, value in averages[0].items()) > 1e-4
    for key, value in averages[0].items():
        assert torch.allclose(value, averages[1][key], atol=1e-6), key


def linear(config: dict[str, Any]) -> dict[str, Any]:
    """Let the first steps grow with the gradient: Adam's own only have its sign, however small it is."""
    config["trainer"]["args"]["optimizer"] = {"name": "AdamW", "args": {"lr": 0.1, "eps": 10.0}}
    return config


@pytest.mark.parametrize("name", ["structure_vae", "shape_vae", "texture_vae"])
def test_frozen_encoder_stays_and_its_decoder_learns(name: str, objects: Path, tmp_path: Path) -> None:
    """Flows train on what an encoder gives; its decoder can still become better."""
    run = Run(toys.config(name), objects, CPU, frozen=["encoder"])
    before = {key: value.clone() for key, value in run.average.values.items()}
    steps(run, 2).save_average(tmp_path / "average.safetensors")
    after, _ = read_average(tmp_path / "average.safetensors")
    for key, value in before.items():
        assert torch.equal(after[key], value.half().float()) or not key.startswith("encoder."), key
    assert any(not torch.equal(after[key], value.half().float()) for key, value in before.items() if "decoder." in key)
    with pytest.raises(ValueError, match="nothing is not one of encoder"):
        Run(toys.config(name), objects, CPU, frozen=["nothing"])


def test_two_processes_do_what_one_does(objects: Path, latents: Path, tmp_path: Path) -> None:
    name, data = "flows", latents
    results = []
    for world in (1, 2):
        config = linear(toys.config(name))
        config["trainer"]["args"].update(batch_size_per_gpu=4 // world, i_log=1)
        path = tmp_path / f"{world}" / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(config))
        arguments = [str(path), "--data", str(data), "--out", str(path.parent), "--steps", "2", "--wait", "4"]
        if world == 1:
            main(arguments)
        else:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*launcher, "-m", "training.train", *arguments],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        results.append(read_average(path.parent / f"{name}.safetensors")[0])
    for key, value in results[0].items():
        assert torch.allclose(value, results[1][key], atol=1e-4, rtol=2e-3), key  # files are in half precision


def test_exported_toy_runs(vaes: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of four runs become a checkpoint of the published layout, and the pipeline generates with it."""
    config = toys.config("flows")
    run = steps(started(config, latents), 1)
    config["models"]["structure"]["args"]["resolution"] = 8  # toys train on 2^3; the weights are the same
    run.save_average(tmp_path / "flows.safetensors")
    paths = {name: [(tmp_path if name == "flows" else vaes) / f"{name}.safetensors"] for name in RUNS}
    objects = {"seen": 8, "held_out": 2}
    facts = {"cost": "nothing", "steps": {"flows": 1}, "objects": objects, "metrics": [], "limits": ["A toy."]}
    export(paths, tmp_path / "checkpoint", facts)
    assert "# Embedded checkpoint" in (tmp_path / "checkpoint" / "README.md").read_text()
    pipeline = Pipeline.from_pretrained(tmp_path / "checkpoint", device="cpu")
    for name in ("512", "1024", "1024_cascade", "1536_cascade"):
        pipeline._require_models(name)
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=(200, 30, 30, 255))
    cond = pipeline.condition(image.convert("RGB"), 512)
    assert cond.shape == (1, 5, 32)
    assert not torch.equal(cond, pipeline.condition(image.convert("RGB"), 1024))
    # Nobody knows how much an untrained structure fills: the cells of an object instead.
    cells = torch.nn.functional.pad(Latents.load(latents / "0000000.npz").coords.int(), (1, 0))
    monkeypatch.setattr(trellis2.pipeline, "structure_grid", lambda logits, side: Grid(cells))
    shape = pipeline.checkpoint.models["shape_slat_decoder"]
    trained, _ = read_average(vaes / "shape_vae.safetensors")
    for name, bias in shape.named_parameters():
        if name.endswith("to_subdiv.bias"):
            assert torch.allclose(bias.float(), trained[f"decoder.{name}"] + VOXEL_BIAS, atol=2e-3)
    for block in shape.modules():
        if hasattr(block, "to_subdiv"):
            block.to_subdiv.bias.fill_(5.0)
    asset = pipeline.generate(image, GenerateOptions(pipeline_type="512")).asset
    assert len(asset.material.coords) == len(cells) * 16**3
    assert asset.material.attrs.isfinite().all()


def test_mean_of_runs(tmp_path: Path) -> None:
    values = torch.arange(6.0).view(2, 3)
    for name, factor in (("a", 1), ("b", 3)):
        save_file({"w": (values * factor).half()}, tmp_path / name, metadata={"step": name})
    state, metadata = mean_of([tmp_path / "a", tmp_path / "none", tmp_path / "b"])
    assert torch.equal(state["w"], 2 * values)
    assert metadata["step"] == "b"
    with pytest.raises(FileNotFoundError, match="none"):
        mean_of([tmp_path / "none"])


def test_flow_latents_are_kept(latents: Path) -> None:
    item = Latents.load(sorted(latents.glob("*.npz"))[0])
    assert item.structure.shape == (8, 2, 2, 2)
    assert len(item.coords) == len(item.shape) == len(item.texture)
    table = json.loads((latents / "normalization.json").read_text())
    assert len(table["shape"]["mean"]) == len(table["texture"]["std"]) == 8


def test_objects_of_which_only_the_structure_is_known_train_it_alone(latents: Path) -> None:
    run = started(toys.config("flows", p_uncond=0.0), latents)
    whole = [run.objective.load(path) for path in sorted(latents.glob("*.npz"))]
    bare = [
        replace(item, coords=item.coords[:0], shape=item.shape[:0], texture=item.texture[:0]) for item in whole[::2]
    ]

    def terms(*numbered: tuple[int, Latents]) -> dict[str, float]:
        generators = [torch.Generator().manual_seed(number) for number, _ in numbered]
        batch = run.objective.prepare([item for _, item in numbered], generators)
        return {name: float(value.detach()) for name, value in run.objective(batch).items()}

    mixed = terms((0, bare[0]), (1, whole[1]), (2, bare[1]), (3, whole[3]))
    alone = terms((1, whole[1]), (3, whole[3]))
    assert mixed["structure"] == pytest.approx(terms(*enumerate(whole))["structure"])
    assert [mixed[name] for name in ("shape", "texture")] == pytest.approx([alone["shape"], alone["texture"]])
    with pytest.raises(ValueError, match="larger batches"):
        terms(*enumerate(bare))


def test_coarse_objects_are_encoded_to_their_structure(vaes: Path) -> None:
    sample = build("mug", 3, COARSE, with_splits=False)
    latents = Encoders(vaes, CPU)(sample)
    assert latents.structure.shape == (8, 2, 2, 2)
    assert latents.structure.any()
    assert len(latents.coords) == len(latents.shape) == len(latents.texture) == 0
    assert latents.shape.shape[1] == latents.texture.shape[1] == 8


def test_coarse_objects_are_mirrored_at_times(vaes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Structure, picture and its map are then those of the object on the other side of x = 0, seen from there."""
    view = replace(draw_view(np.random.default_rng(1)), light=0)
    latents = Encoders(vaes, CPU)(build("mug", 3, COARSE, [view], with_splits=False))
    draws = [latents.one_view(torch.Generator().manual_seed(seed)) for seed in range(20)]
    as_drawn, mirrored = [], []
    for draw in draws:
        (as_drawn if torch.equal(draw.structure, latents.structure) else mirrored).append(draw)
    assert 5 <= len(mirrored) <= 15
    assert all(torch.equal(draw.pictures, latents.pictures) for draw in as_drawn)

    def other(family: str, seed: int) -> Thing:
        thing = make(family, seed)
        parts = [replace(part, solid=part.solid.mirrored()) for part in thing.parts]
        return replace(thing, parts=parts, shift=thing.shift * (-1, 1, 1))

    monkeypatch.setattr(training.data, "make", other)
    truth = Encoders(vaes, CPU)(build("mug", 3, COARSE, [replace(view, yaw=-view.yaw)], with_splits=False))
    given = mirrored[0]
    assert (given.structure - truth.structure).abs().mean() < 0.02 * latents.structure.abs().mean()
    assert (given.structure - latents.structure).abs().mean() > 0.1 * latents.structure.abs().mean()
    place, before, expected = (draw.maps[0, ..., [0, 1, 2, 6]].float() for draw in (given, latents, truth))
    assert (place - expected).abs().mean() < 0.1 * (before - expected).abs().mean()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
def test_muon_is_that_of_pytorch() -> None:
    """Up to the rounding of its bfloat16: matrices of one shape together, convolutions flattened, vectors by AdamW."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (12, 8), "b": (12, 8), "conv": (4, 2, 3, 3), "vector": (5,)}
    first = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ours = {name: torch.nn.Parameter(value.clone()) for name, value in first.items()}
    theirs = {
        name: torch.nn.Parameter(value.clone().flatten(1) if value.ndim > 1 else value.clone())
        for name, value in first.items()
    }
    mine = MuonAdamW(ours, lr=0.1, vector_lr=0.01, betas=(0.9, 0.95))
    others = [
        torch.optim.Muon([theirs[n] for n in ("a", "b", "conv")], lr=0.1, weight_decay=0.0),
        torch.optim.AdamW([theirs["vector"]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for _ in range(4):
        for name, shape in shapes.items():
            ours[name].grad = torch.randn(shape, generator=generator)
            theirs[name].grad = ours[name].grad.view_as(theirs[name])
        for optimizer in (mine, *others):
            optimizer.step()
    for name, value in ours.items():
        moved = (value - first[name]).norm()
        assert moved > 0.01
        assert (value.flatten(1) if value.ndim > 1 else value).sub(theirs[name]).norm() < 0.05 * moved, name


def test_cooldown_ends_at_rest(objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--cooldown: the rate falls to zero until --minutes are over."""
    config = toys.config("structure_vae")
    (tmp_path / "toy.json").write_text(json.dumps(config))
    rates: list[float] = []
    step = Run.train_step

    def watched(run: Run, parts: Any) -> Any:
        terms = step(run, parts)
        rates.append(run.optimizer.param_groups[0]["lr"])
        return terms

    monkeypatch.setattr(Run, "train_step", watched)
    clock = SimpleNamespace(monotonic=lambda: 0.1 * len(rates), sleep=time.sleep)  # a step takes a tenth of a second
    monkeypatch.setattr(training.train, "time", clock)
    arguments = ["--data", objects, "--out", tmp_path, "--minutes", "0.05", "--cooldown", "0.05", "--wait", "4"]
    main([str(value) for value in (tmp_path / "toy.json", *arguments)])
    full = config["trainer"]["args"]["optimizer"]["args"]["lr"]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == full
    assert rates[-1] < 0.2 * full
