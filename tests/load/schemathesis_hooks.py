"""Loaded by schemathesis, for openapi_fuzz.py: what no schema can say."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies

# The binary is a picture.
schemathesis.openapi.format("binary", strategies.just(Path(os.environ["PICTURE"]).read_bytes()))
# The address of a webhook is no private one; nobody answers at this one.
schemathesis.openapi.format("uri", strategies.from_regex(r"https://hooks\.invalid/[a-z0-9/?=&%]{0,40}", fullmatch=True))


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """An empty list comes out of a form as nothing at all, which breaks no rule."""
    return not isinstance(body, dict) or [] not in body.values()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """No key comes twice with different requests, which is refused."""
    for name, value in (case.headers or {}).items():
        if name.lower() == "idempotency-key" and isinstance(value, str) and 1 <= len(value) <= 255:
            case.headers[name] = (uuid.uuid4().hex + value)[:255]
