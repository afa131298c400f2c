"""The command line: its help, its exit codes, what it writes and what it tells."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from pictures import scene
from PIL import Image

from trellis2.__main__ import build_parser, main
from trellis2.errors import InputError
from trellis2.export import read_glb, write_glb
from trellis2.inspect import describe, describe_glb
from trellis2.mesh import MeshStatistics, TexturedMesh
from trellis2.options import option_specs

SMALL = [
    "--pipeline-type=512",
    "--texture-size=1024",
    "--video-frames=3",
    "--video-resolution=64",
    "--sparse-structure-steps=2",
    "--shape-slat-steps=2",
    "--tex-slat-steps=2",
]


def shell(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trellis2", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=300, check=False
    )


def messages(stderr: str) -> list[str]:
    """Without what Warp's native code prints on machines that have no NVIDIA driver."""
    return [line for line in stderr.splitlines() if line and not line.startswith("Warp CUDA warning")]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "toy.png"
    scene("white", 256)[0].save(path)
    return path


@pytest.fixture
def glb(tmp_path: Path) -> Path:
    """Two triangles 1 m wide, 0.5 m deep and 0.25 m high in a GLB's frame, 64 x 64 textures."""
    path = tmp_path / "sheet.glb"
    vertices = torch.tensor([[-0.5, -0.25, 0.0], [0.5, -0.25, 0.25], [0.5, 0.25, 0.25], [-0.5, 0.25, 0.0]])
    mesh = TexturedMesh(
        vertices=vertices,
        faces=torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32),
        normals=torch.nn.functional.normalize(torch.tensor([[-0.25, 0.0, 1.0]]).repeat(4, 1), dim=1),
        uvs=torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
        base_color=torch.full((64, 64, 4), 200, dtype=torch.uint8),
        metallic_roughness=torch.zeros((64, 64, 3), dtype=torch.uint8),
        alpha_mode="BLEND",
        statistics=MeshStatistics(faces=2, vertices=4, charts=1, texture_coverage=1.0),
    )
    write_glb(mesh, path, extras={"untrained": True, "seed": 7})
    return path


# --- help and usage --------------------------------------------------------------------------------------------


def test_help_comes_without_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom trellis2.__main__ import main\ntry:\n    main(['generate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'tqdm'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--decimation-target" in done.stdout


def test_help_names_every_option_with_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for spec in option_specs():
        flag = "--" + spec.name.replace("_", "-")
        assert f"{flag} " in text or f"{flag}," in text, flag
        assert " ".join(spec.description.split()[:4]) in text
    assert "Triangles of the exported model, at most. (100000 to 2000000; default: 1000000)" in text
    assert "--no-preprocess-image" in text
    assert "(default: 1024_cascade)" in text
    assert "130 interrupted" in text


def test_defaults_are_those_of_the_options() -> None:
    """Nothing is passed on that the user did not write."""
    arguments = vars(build_parser().parse_args(["generate", "x.png"]))
    assert not set(arguments) & {spec.name for spec in option_specs()}
    assert arguments["low_vram"] is True
    assert arguments["out"] == Path("out")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--seed", "-3"], "seed", -3),
        (["--no-generate-video"], "generate_video", False),
        (["--return-no-background"], "return_no_background", True),
        (["--pipeline-type", "1536_cascade"], "pipeline_type", "1536_cascade"),
        (["--pipeline_type=1536_cascade"], "pipeline_type", "1536_cascade"),
        (["--texture_size", "2048"], "texture_size", 2048),
        (["--tex-slat-cfg", "2.5"], "tex_slat_cfg", 2.5),
        (["--shape-slat-guidance-interval", "0.2", "0.9"], "shape_slat_guidance_interval", [0.2, 0.9]),
        (["--video-environment", "sunset"], "video_environment", "sunset"),
    ],
)
def test_options_are_read(
    words: list[str], name: str, value: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The picture is refused only after the options were accepted."""
    arguments = ["generate", str(tmp_path / "none.png"), *words]
    assert main(arguments) == 2
    assert "none.png' does not exist" in capsys.readouterr().err
    dashed = [
        w.partition("=")[0].replace("_", "-") + "".join(w.partition("=")[1:]) if w[:2] == "--" else w for w in words
    ]
    assert vars(build_parser().parse_args(["generate", "x.png", *dashed]))[name] == value


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["generate"],
        ["draw", "x.png"],
        ["generate", "x.png", "--nothing"],
        ["generate", "x.png", "--seed", "many"],
        ["generate", "x.png", "--pipeline-type", "2048"],
        ["generate", "x.png", "--device", "tpu"],
    ],
)
def test_usage_errors_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: trellis2" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"trellis2 \d+\.\d+\.\d+\n", capsys.readouterr().out)


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--texture-size", "512"], "texture_size=512 must be a whole number from 1024 to 8192."),
        (["--tex-slat-cfg", "nan"], "tex_slat_cfg=nan must be a number from 0 to 15."),
        (
            ["--shape-slat-guidance-interval", "0.9", "0.1"],
            "shape_slat_guidance_interval=[0.9, 0.1] must be two numbers, 0 <= low <= high <= 1.",
        ),
    ],
)
def test_options_out_of_range_end_with_2(
    words: list[str], message: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(picture), *words]) == 2
    assert capsys.readouterr() == ("", f"trellis2: {message}\n")


def test_a_file_that_is_no_picture_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "letter.pdf"
    path.write_bytes(b"%PDF-1.7")
    assert main(["generate", str(path), "--model", str(tmp_path / "no-such-model")]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"trellis2: The picture {str(path)!r} is a PDF document, not a PNG, JPEG, WebP, BMP, TIFF or GIF file; "
        "save it as PNG or JPEG.\n"
    )


def test_a_missing_model_ends_with_3(picture: Path, tmp_path: Path) -> None:
    done = shell("generate", picture, "--model", tmp_path / "nowhere", "--quiet", "-o", tmp_path / "out")
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(messages(done.stderr)) == 1
    assert "nowhere" in done.stderr
    assert "pass the folder that holds pipeline.json" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(picture), "--device", "cuda", "--quiet"]) == 2
    message = "trellis2: --device cuda needs an NVIDIA GPU, and none was found; use --device cpu.\n"
    assert capsys.readouterr().err == message


def test_an_error_that_is_nobodys_fault_ends_with_1_and_no_traceback(glb: Path) -> None:
    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trellis2", "info", str(glb)]
        with open("/dev/full", "w") as full:
            return subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | environment, check=False
            )

    quiet, loud = run(), run(TRELLIS2_DEBUG="1")
    assert quiet.stderr.startswith("trellis2: OSError: [Errno 28] No space left on device; TRELLIS2_DEBUG=1 shows")
    assert "Traceback (most recent call last)" not in quiet.stderr
    assert loud.stderr.startswith("Traceback (most recent call last)")
    assert quiet.returncode == loud.returncode == 1


# --- info ------------------------------------------------------------------------------------------------------


def test_info_of_a_glb(glb: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(glb), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "glb"
    assert facts["version"] == "2.0"
    assert facts["generator"] == read_glb(glb)[0]["asset"]["generator"]
    assert facts["extras"] == {"untrained": True, "seed": 7}
    assert facts["bytes"] == glb.stat().st_size
    assert (facts["meshes"], facts["triangles"], facts["vertices"]) == (1, 2, 4)
    assert facts["bounds"]["min"] == pytest.approx([-0.5, 0, -0.25])
    assert facts["bounds"]["max"] == pytest.approx([0.5, 0.25, 0.25])
    assert [m["alpha_mode"] for m in facts["materials"]] == ["BLEND"]
    assert sorted(facts["materials"][0]["maps"]) == ["baseColor", "metallicRoughness"]
    assert [(t["size"], t["format"]) for t in facts["textures"]] == [([64, 64], "image/webp")] * 2
    assert all(0 < t["bytes"] < facts["bytes"] for t in facts["textures"])

    assert main(["info", str(glb)]) == 0
    text = capsys.readouterr().out
    assert "2 triangles, 4 vertices" in text
    assert "1.000 x 0.250 x 0.500 m, (-0.500, 0.000, -0.250) to (0.500, 0.250, 0.250)" in text
    assert "untrained: True" in text
    assert "BLEND" in text
    assert "64 x 64, image/webp" in text


def test_info_follows_the_nodes_of_any_glb(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    turn = trimesh.transformations.rotation_matrix(np.pi / 2, [0, 0, 1])
    shift = trimesh.transformations.translation_matrix([10, 0, 0])
    scene.add_geometry(trimesh.creation.box(extents=[1, 2, 4]), transform=shift @ turn)
    path = tmp_path / "box.glb"
    path.write_bytes(scene.export(file_type="glb"))
    facts = describe_glb(path)
    assert facts["triangles"] == 12
    assert facts["bounds"]["min"] == pytest.approx([9, -0.5, -2])
    assert facts["bounds"]["max"] == pytest.approx([11, 0.5, 2])


def test_info_knows_translation_rotation_and_scale(glb: Path, tmp_path: Path) -> None:
    path = edited(glb, tmp_path, lambda document: document["nodes"][0].update(
        translation=[0, 0, 10], rotation=[0, 0, 0.5**0.5, 0.5**0.5], scale=[2, 1, 1]
    ))  # fmt: skip
    facts = describe_glb(path)
    assert facts["bounds"]["min"] == pytest.approx([-0.25, -1, 9.75])
    assert facts["bounds"]["max"] == pytest.approx([0, 1, 10.25])


def edited(glb: Path, folder: Path, change: Any) -> Path:
    """The GLB with its JSON chunk changed."""
    document, binary = read_glb(glb)
    change(document)
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<2I", len(text), 0x4E4F534A) + text + struct.pack("<2I", len(binary), 0x004E4942) + binary
    path = folder / "edited.glb"
    path.write_bytes(struct.pack("<3I", 0x46546C67, 2, 12 + len(body)) + body)
    return path


def test_info_of_a_file_that_is_missing_or_broken(
    glb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(path: Path) -> str:
        assert main(["info", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    missing = tmp_path / "none.glb"
    assert error(missing) == f"trellis2: {missing} does not exist; give a GLB file or a folder with pipeline.json.\n"
    cut = tmp_path / "cut.glb"
    cut.write_bytes(glb.read_bytes()[:-100])
    assert "copy it again" in error(cut)
    cut.write_bytes(b"nothing of the kind")
    assert "is not a GLB file" in error(cut)
    wrong = edited(glb, tmp_path, lambda document: document.pop("accessors"))
    assert "is a damaged glTF model (IndexError: list index out of range); export it again." in error(wrong)


def test_info_of_a_checkpoint(checkpoint_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["info", str(checkpoint_folder / "pipeline.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert facts["kind"] == "checkpoint"
    assert facts["name"] == "Trellis2ImageTo3DPipeline"
    assert facts["untrained"] is True
    assert facts["image_encoder"] == "dinov3"
    assert facts["default_pipeline_type"] == "1024_cascade"
    assert facts["samplers"]["sparse_structure"]["guidance_interval"] == [0.6, 1.0]
    assert len(facts["models"]) == 8
    flow = facts["models"]["tex_slat_flow_model_1024"]
    weights = checkpoint_folder / f"{flow['reference']}.safetensors"
    assert flow["class"] == "ElasticSLatFlowModel"
    assert flow["bytes"] == weights.stat().st_size
    from safetensors.torch import load_file

    tensors = load_file(weights).values()
    assert flow["parameters"] == sum(t.numel() for t in tensors)
    assert len(flow["dtypes"]) == len({t.dtype for t in tensors})

    assert main(["info", str(checkpoint_folder)]) == 0
    text = capsys.readouterr().out
    assert "UNTRAINED" in text
    assert "ElasticSLatFlowModel" in text
    assert "guidance_strength 7.5" in text


def test_info_of_a_damaged_checkpoint_ends_with_3(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint_folder, folder)

    def error() -> str:
        assert main(["info", str(folder)]) == 3
        return capsys.readouterr().err

    decoder = folder / "ckpts" / "shape_slat_decoder.safetensors"
    content = decoder.read_bytes()
    decoder.write_bytes(content[:-10])
    assert "shape_slat_decoder.safetensors is cut short; fetch it again." in error()
    decoder.write_bytes(b"<html>404</html>")
    assert "shape_slat_decoder.safetensors is not a safetensors file; fetch it again." in error()
    decoder.unlink()
    assert "shape_slat_decoder.safetensors is missing" in error()

    config = json.loads((folder / "pipeline.json").read_text())
    config["args"]["models"]["shape_slat_decoder"] = "owner/repository/ckpts/elsewhere"
    (folder / "pipeline.json").write_text(json.dumps(config))
    assert main(["info", str(folder)]) == 0
    assert "owner/repository/ckpts/elsewhere (in another repository)" in capsys.readouterr().out
    del config["args"]["shape_slat_sampler"]
    (folder / "pipeline.json").write_text(json.dumps(config))
    assert "pipeline.json is not usable: KeyError: 'shape_slat_sampler'." in error()
    config["name"] = "Another"
    (folder / "pipeline.json").write_text(json.dumps(config))
    assert "is for 'Another', not Trellis2ImageTo3DPipeline" in error()
    (folder / "pipeline.json").write_text("{")
    assert "pipeline.json" in error()
    (folder / "pipeline.json").unlink()
    assert "pipeline.json is missing; give a GLB file or a folder with pipeline.json." in error()


def test_describe_takes_text_and_path(glb: Path) -> None:
    assert describe(str(glb)) == describe(glb)
    with pytest.raises(InputError):
        describe("none.glb")


# --- generate --------------------------------------------------------------------------------------------------


def test_generate_writes_and_tells(picture: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = shell(
        "generate", picture, "-o", out, "--model", checkpoint_folder, "--json", "--return-no-background",
        "--seed", "1", "--device", "cpu", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["no_background_image"] == str(out / "no_background.png")
    assert result["video"] == str(out / "video.mp4")
    assert result["model_file"] == str(out / "model.glb")
    assert sorted(p.name for p in out.iterdir()) == ["model.glb", "no_background.png", "video.mp4"]
    assert result["seed"] == 1
    assert set(result["timings"]) >= {"prepare", "structure", "shape", "texture", "decode", "model", "video"}
    assert result["seconds"] >= sum(result["timings"].values()) * 0.99
    with Image.open(out / "no_background.png") as cutout:
        assert cutout.mode == "RGBA"
    facts = describe(out / "model.glb")
    assert facts["triangles"] == result["statistics"]["faces"]
    assert facts["extras"]["untrained"] is True
    # The bar and the warning are on standard error.
    assert "untrained" in done.stderr
    assert "100%|" in done.stderr
    assert re.search(r"texture \d/2", done.stderr)


def test_generate_for_people(picture: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    done = shell(
        "generate", picture, "-o", tmp_path / "out", "--quiet", "--no-generate-video", "--no-generate-model",
        "--return_no_background", *SMALL, TRELLIS2_MODEL=str(checkpoint_folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert messages(done.stderr) == []
    cutout, seed, seconds = done.stdout.splitlines()
    assert cutout == f"cut-out {tmp_path / 'out' / 'no_background.png'}"
    assert seed == "seed    42"
    assert re.fullmatch(r"time    \d+\.\d s \(prepare .*decode \d+\.\d, write \d+\.\d\)", seconds)


def test_ctrl_c_ends_with_130_and_leaves_no_half_written_file(
    picture: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["generate", picture, "-o", out, "--model", checkpoint_folder, "--no-generate-model"]
    words += [*SMALL, "--video-frames=720"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trellis2", *map(str, words)], stderr=subprocess.PIPE, text=True, bufsize=0
    )
    assert process.stderr is not None
    seen = ""
    while "video 2/" not in seen:
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith("trellis2: interrupted\n")
    assert "Traceback" not in rest
    assert list(out.iterdir()) == []


def test_a_full_disk_ends_with_4(picture: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk.  (torch 2.6 writes 4 kB where it is imported.)"""
    out = tmp_path / "out"
    words = ["generate", picture, "-o", out, "--model", checkpoint_folder, "--quiet", *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "trellis2", *map(str, words), "--return-no-background", "--no-generate-video"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    assert done.returncode == 4, done.stderr
    assert len(messages(done.stderr)) == 1
    assert list(out.iterdir()) == []
