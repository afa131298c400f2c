"""The multipart form of POST /api/v1/image-to-3d: read with the names and ranges of trellis2.options."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from trellis2.errors import InputError
from trellis2.image import MAX_BYTES
from trellis2.options import SEED_BITS, GenerateOptions, OptionSpec, option_specs

from .settings import Settings
from .webhooks import URL_CHARACTERS, URL_PATH, checked_events

# The service always gives the cut-out, as preview.png.
SPECS = {spec.name: spec for spec in option_specs() if spec.documented and spec.name != "return_no_background"}
WAIT = OptionSpec(
    name="wait",
    kind=bool,
    default=True,
    description="Answer when the job has ended. Off: answer at once with the job, which then goes on by itself.",
    ge=None,
    le=None,
    choices=None,
    documented=False,
    optional=False,
)
WEBHOOK = replace(
    WAIT,
    name="webhook",
    kind=str,
    default="",
    description="Address that is called with the job, as JSON, when it has ended; see TRELLIS2_WEBHOOK_SECRET.",
)
WEBHOOK_EVENTS = replace(
    WEBHOOK,
    name="webhook_events",
    default="completed",
    description="When to call the webhook, if there is one: completed (the job has ended, in whatever way), start, or "
    "both separated by a comma.",
)
AROUND = {spec.name: spec for spec in (WAIT, WEBHOOK, WEBHOOK_EVENTS)}
"""Fields that are about the request and not about what is made."""
FIELD_BYTES = 1024
FORM_BYTES = MAX_BYTES + 2**20
"""Largest body of a request: the picture and what is around it."""

_TRUTHS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


@dataclass(frozen=True)
class Wish:
    """What a request asks for. ``options``: the documented ones, checked. ``webhook``: not checked."""

    picture: bytes
    options: dict[str, Any]
    wait: bool
    webhook: str | None = None
    webhook_events: tuple[str, ...] = ()


async def read_form(request: Request) -> Wish:
    """Raises InputError for a value or a name that is not allowed, HTTPException 400, 413 or 415 for the form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise HTTPException(415, f"The body is {kind or 'of no type'}; send it as multipart/form-data.")
    async with request.form(max_files=1, max_fields=len(SPECS) + len(AROUND) + 1, max_part_size=FIELD_BYTES) as form:
        texts: dict[str, str] = {}
        for name, value in form.multi_items():
            if name != "image":
                texts[name] = _text(name, value, texts)
        webhook = texts.pop(WEBHOOK.name, "") or None
        # Programs that send every field, such as the page at /docs, send the default of this one without a webhook.
        events = checked_events(texts.pop(WEBHOOK_EVENTS.name, "") or WEBHOOK_EVENTS.default)
        wait = _parsed(WAIT, texts.pop(WAIT.name, "true"))
        if not isinstance(wait, bool):
            raise InputError(f"wait={wait!r} must be true or false.")
        given = {name: _parsed(SPECS[name], text) for name, text in texts.items()}
        options = GenerateOptions(**given)
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise InputError("image is missing; upload a picture as the form's file named image.")
        picture = await image.read(MAX_BYTES + 1)
    if len(picture) > MAX_BYTES:
        raise HTTPException(413, f"The picture has more than the {MAX_BYTES // 2**20} MB that are allowed.")
    return Wish(
        picture,
        {name: getattr(options, name) for name in SPECS},
        wait,
        webhook,
        events if webhook is not None else (),
    )


def _text(name: str, value: str | UploadFile, known: dict[str, str]) -> str:
    if name not in SPECS and name not in AROUND:
        *known_names, last = (*SPECS, *AROUND)
        raise InputError(f"{name[:80]!r} is not a parameter; they are image, {', '.join(known_names)} and {last}.")
    if isinstance(value, UploadFile):
        raise InputError(f"{name} is a file; give it as text.")
    if name in known:
        raise InputError(f"{name} is given twice; give it once.")
    return value


def _parsed(spec: OptionSpec, text: str) -> Any:
    """The value that a text means; the text itself where it means none, for the sentence that says so."""
    if spec.kind is bool:
        return _TRUTHS.get(text.lower(), text)
    if spec.kind in (int, float) and re.fullmatch(r"[0-9.eE+-]+", text):  # Python reads more, such as 1_000
        assert isinstance(spec.kind, type)
        try:
            return spec.kind(text)
        except ValueError:
            return text
    return text


def form_schema() -> dict[str, Any]:
    """The form as OpenAPI describes it."""
    image = {"type": "string", "format": "binary", "description": "Picture of one object."}
    properties = {"image": image} | {spec.name: _schema(spec) for spec in (*SPECS.values(), *AROUND.values())}
    properties[WEBHOOK_EVENTS.name]["pattern"] = "^( *(start|completed) *(, *(start|completed) *)*)?$"
    schema = {"type": "object", "required": ["image"], "properties": properties, "additionalProperties": False}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def webhook_schema(settings: Settings) -> dict[str, Any]:
    """The field of the webhook, as a deployment takes it."""
    if not settings.webhook_secrets:
        text = "This service sends no webhooks, because TRELLIS2_WEBHOOK_SECRET is not set; leave this empty."
        return {"type": "string", "enum": [""], "default": "", "description": text}
    scheme, port = ("https?", "(:[0-9]+)?") if settings.webhook_private else ("https", "(:443|:80)?")
    pattern = rf"^{scheme}://[A-Za-z0-9.-]+{port}{URL_PATH}$"
    address = {"type": "string", "format": "uri", "pattern": pattern, "maxLength": URL_CHARACTERS}
    return {"anyOf": [address, {"enum": [""]}], "default": "", "description": WEBHOOK.description}


def _schema(spec: OptionSpec) -> dict[str, Any]:
    assert isinstance(spec.kind, type)
    schema: dict[str, Any] = {"type": _JSON_TYPES[spec.kind], "default": spec.default, "description": spec.description}
    if spec.kind is bool:
        del schema["type"]
        schema["anyOf"] = [{"type": "boolean"}, {"enum": [0, 1, *_TRUTHS]}]  # a form has only texts
    low, high = spec.ge, spec.le
    if spec.kind is int and low is None and high is None:
        high = 2**SEED_BITS - 1
        low = -high
    limits = {"minimum": low, "maximum": high, "enum": spec.choices and list(spec.choices)}
    return schema | {key: value for key, value in limits.items() if value is not None}
