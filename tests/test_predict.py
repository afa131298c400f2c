"""predict.py: what Cog reads from its text, and what the real server answers."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from cog_server import QUICK_INPUTS as QUICK
from cog_server import ROOT, CogServer, cog_server, declared_inputs, declared_outputs, openapi_document
from pictures import object_colour, object_mask
from PIL import Image

from trellis2.errors import InputError
from trellis2.export import read_glb
from trellis2.options import GenerateOptions, option_specs

SOURCE = (ROOT / "predict.py").read_text()

# name, JSON type, default, minimum, maximum
DOCUMENTED: list[tuple[str, str, Any, Any, Any]] = [
    ("image", "string", None, None, None),
    ("seed", "integer", 42, None, None),
    ("randomize_seed", "boolean", False, None, None),
    ("preprocess_image", "boolean", True, None, None),
    ("return_no_background", "boolean", False, None, None),
    ("generate_video", "boolean", True, None, None),
    ("generate_model", "boolean", True, None, None),
    ("pipeline_type", "string", "1024_cascade", None, None),
    ("sparse_structure_steps", "integer", 12, 1, 50),
    ("sparse_structure_cfg", "number", 7.5, 0, 15),
    ("shape_slat_steps", "integer", 12, 1, 50),
    ("shape_slat_cfg", "number", 7.5, 0, 15),
    ("tex_slat_steps", "integer", 12, 1, 50),
    ("tex_slat_cfg", "number", 7.5, 0, 15),
    ("decimation_target", "integer", 1000000, 100000, 2000000),
    ("texture_size", "integer", 4096, 1024, 8192),
]
PIPELINE_TYPES = ["512", "1024", "1024_cascade", "1536_cascade"]

# What the replicate client looks for in the logs.
PROGRESS_LINE = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)", re.MULTILINE)

VIDEO_FRAMES = 4
VIDEO_RESOLUTION = 64


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def decoded(url: str, kind: str) -> bytes:
    head, _, text = url.partition(";base64,")
    assert head == f"data:{kind}"
    return base64.b64decode(text, validate=True)


@pytest.fixture(scope="module")
def picture() -> str:
    """A toy with a transparent background, as a data URL."""
    rgba = Image.fromarray((object_colour(96) * 255).astype("uint8"))
    rgba.putalpha(Image.fromarray((object_mask(96) * 255).astype("uint8")))
    file = io.BytesIO()
    rgba.save(file, "PNG")
    return data_url(file.getvalue())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Iterator[CogServer]:
    folder = tmp_path_factory.mktemp("cog")
    environment = {
        "TRELLIS2_MODEL": str(checkpoint_folder),
        "TRELLIS2_VIDEO_FRAMES": str(VIDEO_FRAMES),
        "TRELLIS2_VIDEO_RESOLUTION": str(VIDEO_RESOLUTION),
        "TMPDIR": str(folder),
    }
    with cog_server(folder, environment) as running:
        health = running.wait_while("STARTING")
        assert health["status"] == "READY", health
        yield running


@pytest.fixture(scope="module")
def everything(server: CogServer, picture: str) -> Any:
    """The answer to a prediction that asked for all three files."""
    wanted = {"return_no_background": True, "generate_video": True, "generate_model": True}
    status, answer = server.predict(image=picture, seed=7, **(QUICK | wanted))
    assert status == 200
    assert answer["status"] == "succeeded", answer
    return answer


# What `cog build` reads


def test_the_declared_inputs_are_the_table_of_options() -> None:
    inputs = declared_inputs(SOURCE)
    specs = [spec for spec in option_specs() if spec.documented]
    assert list(inputs) == ["image", *(spec.name for spec in specs)] == [row[0] for row in DOCUMENTED]
    assert inputs.pop("image").keys() == {"type", "description", "accept"}
    for spec in specs:
        assert isinstance(spec.kind, type)
        declared = {
            "type": spec.kind.__name__,
            "default": spec.default,
            "description": spec.description,
            "ge": spec.ge,
            "le": spec.le,
            "choices": None if spec.choices is None else list(spec.choices),
        }
        assert inputs[spec.name] == {key: value for key, value in declared.items() if value is not None}
        assert type(inputs[spec.name]["default"]) is type(spec.default)


def test_the_outputs() -> None:
    assert declared_outputs(SOURCE) == ["no_background_image", "video", "model_file"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("default=42", "default=6 * 7"),
        ("default=42", "default=SEED"),
        ("le=50", "le=MOST_STEPS"),
        ("le=2000000", "le=2 * 10**6"),
        ('"Random seed.', '"Random " "seed.'),
        ('"Random seed.', 'f"Random seed.'),
        ('choices=["512", ', "choices=[FASTEST, "),
    ],
)
def test_what_cog_would_drop_is_seen(old: str, new: str) -> None:
    assert old in SOURCE
    with pytest.raises(ValueError, match="is not one plain literal"):
        openapi_document(SOURCE.replace(old, new, 1))


def test_an_output_without_default_is_seen() -> None:
    with pytest.raises(ValueError, match="default None"):
        openapi_document(SOURCE.replace("video: Optional[Path] = None", "video: Optional[Path]"))


@pytest.mark.filterwarnings("ignore:BasePredictor is deprecated", "ignore:.*predict.. is deprecated")
def test_cogs_own_inspector_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from cog import Path as CogPath
    from cog._inspector import create_predictor

    monkeypatch.syspath_prepend(str(ROOT))
    info = create_predictor("predict", "Predictor")
    kinds = {"Path": CogPath, "bool": bool, "float": float, "int": int, "str": str}
    declared = declared_inputs(SOURCE)
    assert [name for name, _ in sorted(info.inputs.items(), key=lambda item: item[1].order)] == list(declared)
    for name, field in info.inputs.items():
        spec = declared[name]
        assert field.type.python_type_name() == kinds[spec["type"]].__name__
        for keyword in ("default", "description", "ge", "le", "choices"):
            assert getattr(field, keyword) == spec.get(keyword), (name, keyword)
    assert list(info.output.fields) == declared_outputs(SOURCE)


# What the server answers


def test_the_served_schema_is_the_documentation(server: CogServer) -> None:
    assert server.health()["status"] == "READY"
    status, document = server.request("GET", "/openapi.json")
    assert status == 200
    schemas = document["components"]["schemas"]
    inputs = schemas["Input"]
    assert inputs["required"] == ["image"]
    assert schemas["pipeline_type"]["enum"] == PIPELINE_TYPES
    served = sorted(inputs["properties"].items(), key=lambda item: item[1]["x-order"])
    rows = [
        (
            name,
            (schemas[name] if "allOf" in field else field)["type"],
            field.get("default"),
            field.get("minimum"),
            field.get("maximum"),
        )
        for name, field in served
    ]
    assert rows == DOCUMENTED


def test_three_files_that_open(everything: Any) -> None:
    output = everything["output"]
    cutout = Image.open(io.BytesIO(decoded(output["no_background_image"], "image/png")))
    assert cutout.mode == "RGBA"
    assert cutout.getchannel("A").getextrema() == (0, 255)
    with av.open(io.BytesIO(decoded(output["video"], "video/mp4"))) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(VIDEO_RESOLUTION, VIDEO_RESOLUTION, 3)] * VIDEO_FRAMES
    model = decoded(output["model_file"], "model/gltf-binary")
    assert model[:4] == b"glTF"
    assert int.from_bytes(model[8:12], "little") == len(model)


def test_the_answer_reports_seed_times_and_faces(everything: Any, tmp_path: Path) -> None:
    metrics = everything["metrics"]
    assert metrics["seed"] == 7
    assert set(metrics["timings"]) >= {"prepare", "structure", "shape", "texture", "decode", "model", "video"}
    assert 0 < sum(metrics["timings"].values()) <= metrics["predict_time"]
    (tmp_path / "model.glb").write_bytes(decoded(everything["output"]["model_file"], "model/gltf-binary"))
    gltf, _ = read_glb(tmp_path / "model.glb")
    (mesh,) = gltf["meshes"]
    assert metrics["faces"] == gltf["accessors"][mesh["primitives"][0]["indices"]]["count"] // 3 > 0


def test_the_logs_are_progress_for_the_replicate_client(everything: Any) -> None:
    lines = [line for line in everything["logs"].splitlines() if "%|" in line]
    found = [PROGRESS_LINE.match(line) for line in lines]
    assert all(found)
    percents = [int(match[1]) for match in found if match]
    assert percents == sorted(percents)
    assert percents[0] <= 5
    assert percents[-1] == 100
    assert len(set(percents)) > 10
    assert all(int(match[2]) <= int(match[3]) for match in found if match)
    stages = list(dict.fromkeys(line.split()[-1] for line in lines))
    assert stages == ["prepare", "condition", "structure", "shape", "texture", "decode", "model", "video"]


def test_nothing_asked_for_is_null_and_a_drawn_seed_is_reported(server: CogServer, picture: str) -> None:
    status, answer = server.predict(image=picture, seed=7, randomize_seed=True, **QUICK)
    assert (status, answer["status"]) == (200, "succeeded"), answer
    assert answer["output"] == {"no_background_image": None, "video": None, "model_file": None}
    assert answer["metrics"]["seed"] != 7
    assert "faces" not in answer["metrics"]


def test_the_picture_as_it_is_has_a_cutout_too(server: CogServer, picture: str) -> None:
    asked = {"preprocess_image": False, "return_no_background": True}
    status, answer = server.predict(image=picture, **(QUICK | asked))
    assert (status, answer["status"]) == (200, "succeeded"), answer
    Image.open(io.BytesIO(decoded(answer["output"]["no_background_image"], "image/png"))).verify()


def test_a_warning_is_in_the_log_once(server: CogServer) -> None:
    file = io.BytesIO()
    Image.fromarray((object_colour(96) * 255).astype("uint8")).save(file, "PNG")  # stripes up to the border
    status, answer = server.predict(image=data_url(file.getvalue()), **QUICK)
    assert (status, answer["status"]) == (200, "succeeded"), answer
    assert answer["logs"].count("The background was removed by colour and may be wrong") == 1


def test_a_whole_float_is_a_whole_number(server: CogServer, picture: str) -> None:
    status, answer = server.predict(image=picture, seed=12.0, **QUICK)
    assert (status, answer["status"]) == (200, "succeeded"), answer
    assert answer["metrics"]["seed"] == 12


def test_all_wrong_inputs_are_named_at_once(server: CogServer, picture: str) -> None:
    wrong: dict[str, Any] = {
        "seed": 12.5,
        "randomize_seed": "yes",
        "generate_video": 1,
        "pipeline_type": "2048",
        "sparse_structure_steps": 51,
        "sparse_structure_cfg": -0.1,
        "shape_slat_steps": 0,
        "shape_slat_cfg": 15.5,
        "tex_slat_cfg": "7.5",
        "decimation_target": 99999,
        "texture_size": 8193,
    }
    status, answer = server.predict(image=picture, **wrong)
    assert status == 422
    messages = {detail["loc"][-1]: detail["msg"] for detail in answer["detail"]}
    assert set(messages) == set(wrong)
    assert messages["pipeline_type"] == '"2048" is not one of ["512","1024","1024_cascade","1536_cascade"]'
    assert messages["sparse_structure_steps"] == "51 is greater than the maximum of 50"


def test_the_picture_is_required(server: CogServer) -> None:
    status, answer = server.predict(seed=1)
    assert status == 422
    assert [(detail["loc"][-1], detail["msg"]) for detail in answer["detail"]] == [("image", "Field required")]


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("file:///etc/hostname", "image='file:///etc/hostname' is not a picture: upload a file,"),
        ("a red chair", "image='a red chair' is not a picture: upload a file, or give an http(s) or data URL."),
        ("data:image/png;base64,====", "image is empty: upload a picture, or check the base64 text of its data URL."),
        (data_url(b"not a picture at all"), ""),
        (data_url(bytes.fromhex("89504e470d0a1a0a0000000d49484452")), ""),
    ],
)
def test_a_bad_picture_fails_with_one_sentence(server: CogServer, image: str, sentence: str) -> None:
    status, answer = server.predict(image=image, **QUICK)
    assert (status, answer["status"]) == (200, "failed")
    assert "InputError: " in answer["error"]
    assert sentence in answer["error"]
    assert answer["error"].endswith(".")
    assert "\n" not in answer["error"]
    assert "Traceback" not in answer["error"] + answer["logs"]
    assert str(server.folder) not in answer["error"]


def test_cancel_in_the_middle_and_go_on(server: CogServer, picture: str) -> None:
    name = uuid.uuid4().hex
    long = {"sparse_structure_steps": 50, "shape_slat_steps": 50, "tex_slat_steps": 50, "generate_model": True}
    inputs = {"image": picture} | QUICK | long
    answers: list[tuple[int, Any]] = []
    waiting = threading.Thread(target=lambda: answers.append(server.predict(name, **inputs)))
    waiting.start()
    assert server.wait_while("READY")["status"] == "BUSY"
    deadline = time.monotonic() + 60
    while True:
        status, state = server.request("PUT", f"/predictions/{name}", {"input": inputs})
        assert status == 202, state
        if len(PROGRESS_LINE.findall(state.get("logs", ""))) > 3:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.predict(image=picture, **QUICK)[0] == 409
    assert server.request("POST", f"/predictions/{name}/cancel")[0] == 200
    waiting.join(30)
    ((status, answer),) = answers
    assert (status, answer["status"]) == (200, "canceled")
    assert server.wait_while("BUSY")["status"] == "READY"
    assert list(server.folder.glob("trellis2-*/*")) == []
    status, answer = server.predict(image=picture, seed=3, **QUICK)
    assert (status, answer["status"], answer["metrics"]["seed"]) == (200, "succeeded", 3)


def test_cancelling_what_does_not_run(server: CogServer) -> None:
    assert server.request("POST", "/predictions/nobody/cancel")[0] == 404


def test_files_of_the_previous_prediction_are_deleted(server: CogServer, picture: str) -> None:
    server.predict(image=picture, **(QUICK | {"generate_model": True}))
    assert [path.name for path in server.folder.glob("trellis2-*/*")] == ["model.glb"]
    large_answer = Path("/tmp/coglet/predictions") / uuid.uuid4().hex / "outputs" / "spill_1.json"
    large_answer.parent.mkdir(parents=True)
    large_answer.write_text("{}")
    server.predict(image=picture, **(QUICK | {"return_no_background": True}))
    assert [path.name for path in server.folder.glob("trellis2-*/*")] == ["no_background.png"]
    assert not large_answer.exists()
    server.predict(image="a red chair", **QUICK)
    assert list(server.folder.glob("trellis2-*/*")) == []


def test_a_broken_checkpoint_fails_setup_with_its_sentence(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "pipeline.json").write_text("{")
    with cog_server(tmp_path, {"TRELLIS2_MODEL": str(checkpoint)}) as server:
        health = server.wait_while("STARTING")
        assert health["status"] == "SETUP_FAILED"
        assert f"CheckpointError: {checkpoint / 'pipeline.json'}" in health["setup"]["logs"]
        assert "Traceback" not in health["setup"]["logs"]
        status, answer = server.predict(image="data:,")
        assert (status, answer["status"]) == (503, "failed")


def test_what_removes_backgrounds_is_loaded_before_the_first_prediction(
    tmp_path: Path, checkpoint_folder: Path
) -> None:
    (tmp_path / "network").mkdir()
    environment = {"TRELLIS2_MODEL": str(checkpoint_folder), "TRELLIS2_MATTING": str(tmp_path / "network")}
    with cog_server(tmp_path, environment) as server:
        health = server.wait_while("STARTING")
    assert health["status"] == "SETUP_FAILED"
    missing = tmp_path / "network" / "model.safetensors"
    assert f"CheckpointError: {missing} is missing; the checkpoint is incomplete" in health["setup"]["logs"]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("TRELLIS2_VIDEO_FRAMES", "many", "TRELLIS2_VIDEO_FRAMES='many' must be a whole number."),
        ("TRELLIS2_VIDEO_RESOLUTION", "4096", "video_resolution=4096 must be"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv(variable, value)
    from predict import video_settings

    with pytest.raises(InputError, match=re.escape(sentence)):
        video_settings()


def test_the_documented_video_is_the_default() -> None:
    options = GenerateOptions()
    assert (options.video_frames, options.video_resolution) == (120, 1024)
