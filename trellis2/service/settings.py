"""Settings of a deployment, read from the environment once; api.py lists them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trellis2.errors import InputError
from trellis2.options import video_settings


@dataclass(frozen=True)
class Settings:
    """data: folder of the service's files. queue_limit: jobs that may wait. keep_hours and keep_gigabytes: bounds of
    finished jobs' files. video: options of the turntable. Empty ``api_keys``: everybody may come in."""

    data: Path = Path("out/service")
    host: str = "127.0.0.1"
    port: int = 8000
    queue_limit: int = 16
    keep_hours: float = 168.0
    keep_gigabytes: float = 20.0
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    video: Mapping[str, Any] = field(default_factory=dict)


def settings_from_environment() -> Settings:
    """Read the settings; raises InputError naming the variable, its value and what is allowed."""
    given = {
        name: _parsed(variable, os.environ[variable], parse, allowed)
        for variable, (name, parse, allowed) in _VARIABLES.items()
        if variable in os.environ
    }
    return Settings(**given, video=video_settings())


def _parsed(variable: str, text: str, parse: Callable[[str], Any], allowed: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise InputError(f"{variable}={text!r} must be {allowed}.") from error


def _between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _keys(text: str) -> tuple[str, ...]:
    # A variable that is set but empty is a slip, and would open the service to everybody.
    if not (keys := _words(text)):
        raise ValueError(text)
    return keys


_VARIABLES: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "TRELLIS2_DATA": ("data", Path, "a folder"),
    "TRELLIS2_HOST": ("host", str, "an address"),
    "TRELLIS2_PORT": ("port", _between(int, 1, 65535), "a whole number from 1 to 65535"),
    "TRELLIS2_QUEUE": ("queue_limit", _between(int, 1, 100_000), "a whole number from 1 to 100000"),
    "TRELLIS2_KEEP_HOURS": ("keep_hours", _between(float, 0.1, 1e6), "a number of hours from 0.1 to 1000000"),
    "TRELLIS2_KEEP_GB": ("keep_gigabytes", _between(float, 0.1, 1e6), "a number of gigabytes from 0.1 to 1000000"),
    "TRELLIS2_API_KEYS": ("api_keys", _keys, "one key or several, separated by commas"),
    "TRELLIS2_CORS_ORIGINS": ("cors_origins", _words, "origins such as https://example.com, separated by commas"),
}
