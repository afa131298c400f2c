"""docs/cog.md: every sentence that a prediction or the setup can fail with is in its tables, and no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "cog.md").read_text()
ERRORS = {"InputError", "CheckpointError", "CapacityError"}
# What a predictor runs; __main__ and inspect are for the command line.
MODULES = ("bake", "checkpoint", "environment", "export", "image", "memory", "options", "pipeline", "render")
# Functions whose errors no input and no setting of a container can cause.
UNREACHABLE = {"bake", "environment", "read_glb", "write_video", "_open_stream"}


def sentences(path: Path) -> list[tuple[str, str]]:
    """(function, text) of all that ``path`` raises or gives to ``memory_given_back``; what is filled in is ``{}``."""
    tree = ast.parse(path.read_text())
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                name = getattr(getattr(node, "func", None), "id", None)
                if isinstance(node, ast.Call) and name in {*ERRORS, "memory_given_back"} and node.args:
                    value = node.args[0]
                    if isinstance(value, ast.Name):
                        value = constants.get(value.id, value)
                    if isinstance(value, (ast.JoinedStr, ast.Constant)):
                        found.append((function.name, text_of(value)))
            if function.name == "_smaller":
                found += [
                    (function.name, text_of(n.value)) for n in function.body if isinstance(n, ast.Return) and n.value
                ]
    return found


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr)
    return "".join(text_of(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def documented() -> list[str]:
    """The quoted beginnings of the tables of sentences."""
    _, _, tables = GUIDE.partition("A picture that cannot be used")
    cells = re.findall(r'^\| (".*?) \|', tables, re.MULTILINE)
    return [quoted for cell in cells for quoted in re.findall(r'"([^"]+)"', cell)]


ALL = [
    text
    for path in (ROOT / "predict.py", *(ROOT / "trellis2" / f"{name}.py" for name in MODULES))
    for function, text in sentences(path)
    if function not in UNREACHABLE
]


@pytest.mark.parametrize("text", sorted(set(ALL)))
def test_every_error_is_in_the_guide(text: str) -> None:
    text = text.replace("{}.", "Trellis2ImageTo3DPipeline.")
    assert any(quoted in text for quoted in documented())


def test_the_guide_has_no_error_that_is_none() -> None:
    texts = [text.replace("{}.", "Trellis2ImageTo3DPipeline.") for text in ALL]
    assert [quoted for quoted in documented() if not any(quoted in text for text in texts)] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:tests|weights|docs|trellis2)/[\w./-]+)`", GUIDE))))
def test_files_that_the_guide_names_are_there(name: str) -> None:
    assert (ROOT / name).exists() or name == "weights/TRELLIS.2-4B"


def test_variables_that_the_guide_names_are_read() -> None:
    sources = "".join(path.read_text() for folder in ("trellis2", "o-voxel") for path in (ROOT / folder).rglob("*.py"))
    sources += (ROOT / "cog.yaml").read_text() + (ROOT / "weights" / "fetch.py").read_text()
    outside = {"HF_HOME", "TMPDIR", "UNHEALTHY", "STARTING", "SETUP_FAILED"}  # read by libraries; states
    names = set(re.findall(r"`-? ?([A-Z][A-Z0-9_]{4,})(?:=[^`]*)?`", GUIDE)) - outside
    assert {"TRELLIS2_MODEL", "MAX_JOBS"} <= names
    assert [name for name in sorted(names) if name not in sources and name != "PATH"] == []
