"""The README's option table and Python example stay true.

After a change of trellis2/options.py:  python tests/test_readme.py  writes the table anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trellis2.options import option_specs

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- options: written by tests/test_readme.py -->\n", "<!-- /options -->"


def shown(value: Any) -> str:
    if value is None:
        return "of the checkpoint"
    return str(value).lower() if isinstance(value, bool) else str(value)


def table() -> str:
    rows = ["| option | default | allowed | what it does |", "|---|---|---|---|"]
    rows += [f"| `{s.name}` | {shown(s.default)} | {s.allowed} | {s.description} |" for s in option_specs()]
    return "\n".join(rows) + "\n"


def test_the_option_table_is_that_of_the_code() -> None:
    text = README.read_text()
    assert text[text.index(START) + len(START) : text.index(END)] == table()


def test_the_licence_of_everything_that_is_installed_is_told() -> None:
    root = README.parent
    names = set(re.findall(r"^([a-z][\w.-]*)==", (root / "requirements-cog.txt").read_text(), re.MULTILINE))
    names |= set(re.findall(r"([\w-]+)(?:==\S+|\.git@\S+)$", (root / "cog.yaml").read_text(), re.MULTILINE))
    for project in ("pyproject.toml", "o-voxel/pyproject.toml"):
        text = re.sub(r"^test = \[.*?^\]", "", (root / project).read_text(), flags=re.MULTILINE | re.DOTALL)
        _, _, text = text.partition("\ndependencies")
        names |= set(
            re.findall(r'"([a-z][\w.-]*)(?:\[\w+\])?(?:[<>=][^"]*)?"', text.partition("\n[project.scripts]")[0])
        )
    assert {"flash-attn", "CuMesh", "torch", "warp-lang", "uvicorn", "trimesh"} <= names
    others = {"torch": "pytorch", "av": "pyav", "warp-lang": "warp", "opencv-python": "opencv"}
    _, _, licences = README.read_text().lower().partition("| part | licence |")
    missing = [
        name
        for name in sorted(names - {"o-voxel", "trellis2", "setuptools.build_meta", "py.typed"})
        if others.get(name.removesuffix("-headless"), re.sub(r"^(opentelemetry).*", r"\1", name)).lower()
        not in licences
    ]
    assert missing == []


def test_the_python_example_runs(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text().split("## Python\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(README.parent)
    for mine, ours in (("weights/embedded", checkpoint_folder), ('"out"', f'"{tmp_path}"')):
        assert mine in example
        example = example.replace(mine, str(ours))
    exec(compile(example, "README.md", "exec"), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.glb", "video.mp4"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("100% ")
    assert lines[-1].startswith(str(tmp_path / "model.glb"))


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(text[: text.index(START) + len(START)] + table() + text[text.index(END) :])
