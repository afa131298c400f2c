"""Loaded by schemathesis, for openapi_fuzz.py: what the schema calls binary is a picture, which no schema can say."""

from __future__ import annotations

import os
from pathlib import Path

import schemathesis
from hypothesis import strategies

schemathesis.openapi.format("binary", strategies.just(Path(os.environ["PICTURE"]).read_bytes()))
