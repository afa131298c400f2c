"""The page at /: a form over the routes of the service, for people.

It is the template and the files in static/, all of this project and all served from here. Its script calls the routes
as any other caller does, so that keys, limits and the queue hold for it too.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse

from trellis2.image import MAX_BYTES
from trellis2.options import OptionSpec

from .forms import SPECS
from .settings import Settings

STATIC = Path(__file__).parent / "static"
EXAMPLES = Path(__file__).parents[2] / "assets" / "example_image"
"""Pictures to try; there are none where the package was installed without its repository."""

STAGES = {
    "prepare": "Cut out the object",
    "condition": "Look at the picture",
    "structure": "Coarse structure",
    "shape": "Detailed shape",
    "texture": "Material",
    "decode": "Surface",
    "model": "Model file",
    "video": "Turntable video",
}
"""The stages of a run in their order, with titles; the pipeline itself takes seconds to import."""

# Named here and not guessed from the system, whose tables differ; a script of another type is not run.
_STATIC_TYPES = {
    "icon.svg": "image/svg+xml",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "viewer.js": "text/javascript",
}
_PICTURE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)

_ALWAYS_SHOWN = (
    "pipeline_type",
    "seed",
    "randomize_seed",
    "preprocess_image",
    "generate_video",
    "generate_model",
)
_SLIDER_SPAN = 50  # a wider range is typed: a finger cannot hit one of a million values


def add_page(app: FastAPI, settings: Settings) -> None:
    """Add the page and its files to ``app``. Where keys are set the page asks for one."""
    page = _page(with_key=bool(settings.api_keys))
    examples = _examples()

    @app.get("/", include_in_schema=False)
    async def read_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.get("/static/{name}", include_in_schema=False)
    async def read_static(name: str) -> FileResponse:
        if name not in _STATIC_TYPES:
            raise HTTPException(404, "There is no such file.")
        return FileResponse(STATIC / name, media_type=_STATIC_TYPES[name])

    @app.get("/examples/{name}", include_in_schema=False)
    async def read_example(name: str) -> FileResponse:
        if name not in examples:
            raise HTTPException(404, "There is no such example.")
        return FileResponse(examples[name], media_type=_PICTURE_TYPES[examples[name].suffix])


def _examples() -> dict[str, Path]:
    return {path.name: path for path in sorted(EXAMPLES.glob("*")) if path.suffix in _PICTURE_TYPES}


def _page(*, with_key: bool) -> str:
    template = Template((STATIC / "page.html").read_text(encoding="utf-8"))
    more = [spec for name, spec in SPECS.items() if name not in _ALWAYS_SHOWN]
    return template.substitute(
        key=_KEY_FIELD if with_key else "",
        max_bytes=MAX_BYTES,
        examples="\n".join(map(_example, _examples())),
        options="\n".join(_field(SPECS[name]) for name in _ALWAYS_SHOWN),
        more_options="\n".join(map(_field, more)),
        stages="\n".join(f'<li data-stage="{name}">{_STAGE.substitute(title=STAGES[name])}</li>' for name in STAGES),
    )


_STAGE = Template(
    '<span>$title</span> <progress max="1" value="0" aria-label="$title"></progress> <span class="note"></span>'
)

_KEY_FIELD = """<div class="field">
<label for="key">Key</label>
<input type="password" id="key" autocomplete="off" aria-describedby="key-hint">
<p class="hint" id="key-hint">This service asks for a key. It is kept until this tab is closed.</p>
</div>"""


def _example(name: str) -> str:
    title = escape(Path(name).stem)
    return (
        f'<button type="button" class="example" data-name="{escape(name)}" aria-label="Example {title}" '
        f'title="{title}"><img src="examples/{escape(name)}" alt="" width="64" height="64"></button>'
    )


def _field(spec: OptionSpec) -> str:
    """An option as label, control and hint."""
    label = f'<label for="{spec.name}">{_title(spec.name)}</label>'
    hint = f'<p class="hint" id="{spec.name}-hint">{escape(_hint(spec))}</p>'
    common = f'id="{spec.name}" name="{spec.name}" aria-describedby="{spec.name}-hint"'
    if spec.kind is bool:
        checked = " checked" if spec.default else ""
        return f'<div class="field check"><input type="checkbox" {common}{checked}>{label}{hint}</div>'
    if spec.choices is not None:
        choices = "".join(
            f"<option{' selected' if choice == spec.default else ''}>{escape(choice)}</option>"
            for choice in spec.choices
        )
        return f'<div class="field">{label}<select {common}>{choices}</select>{hint}</div>'
    limits = "" if spec.ge is None or spec.le is None else f' min="{spec.ge:.15g}" max="{spec.le:.15g}"'
    value = f'value="{spec.default:.15g}" step="{1 if spec.kind is int else 0.1}"{limits}'
    if limits and spec.le - spec.ge <= _SLIDER_SPAN:  # type: ignore[operator]
        shown = f'<output for="{spec.name}">{spec.default:.15g}</output>'
        return f'<div class="field">{label}{shown}<input type="range" {common} {value}>{hint}</div>'
    return f'<div class="field">{label}<input type="number" {common} {value}>{hint}</div>'


def _title(name: str) -> str:
    title = name.replace("_slat", "").replace("tex_", "texture_").replace("_", " ")
    return (title[0].upper() + title[1:]).replace("cfg", "CFG")


def _hint(spec: OptionSpec) -> str:
    if spec.ge is None or spec.le is None:
        return spec.description
    return f"{spec.description} {spec.ge:.15g} to {spec.le:.15g}; default {spec.default:.15g}."
