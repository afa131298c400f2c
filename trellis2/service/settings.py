"""Settings of a deployment, read from the environment once; api.py lists them."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trellis2.errors import InputError
from trellis2.options import video_settings


@dataclass(frozen=True)
class Settings:
    """data: folder of the service's files. redis: address of the Redis that connects workers on other machines; None:
    this process has the model. storage: folder or address of uploads and outputs; None: below ``data``. lease_seconds:
    time after which a worker that is not heard of counts as dead. queue_limit: jobs that may wait. job_seconds: time a
    job may take. keep_*: bounds of finished jobs' files. video: options of the turntable. Empty ``api_keys``:
    everybody may come in. webhook_*: see ``webhooks``; empty ``webhook_secrets``: none are sent, empty
    ``webhook_hosts``: to everybody."""

    data: Path = Path("out/service")
    redis: str | None = None
    storage: str | None = None
    lease_seconds: float = 20.0
    host: str = "127.0.0.1"
    port: int = 8000
    queue_limit: int = 16
    job_seconds: float = 3600.0
    keep_hours: float = 168.0
    keep_gigabytes: float = 20.0
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    webhook_secrets: tuple[bytes, ...] = ()
    webhook_hosts: tuple[str, ...] = ()
    webhook_private: bool = False
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
        secret = parse in (_secrets, _redis)  # the log is no place for them
        shown = variable if secret else f"{variable}={text!r}"
        raise InputError(f"{shown} must be {allowed}.") from error


def _between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse


def _redis(text: str) -> str:
    if urlsplit(text).scheme not in ("redis", "rediss"):
        raise ValueError(text)
    return text


def _storage(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _keys(text: str) -> tuple[str, ...]:
    # A variable that is set but empty is a slip, and would open the service to everybody.
    if not (keys := _words(text)):
        raise ValueError(text)
    return keys


def _secrets(text: str) -> tuple[bytes, ...]:
    secrets = tuple(base64.b64decode(_after(word, "whsec_"), validate=True) for word in _keys(text))
    if not all(24 <= len(secret) <= 64 for secret in secrets):
        raise ValueError(text)
    return secrets


def _after(word: str, prefix: str) -> str:
    if not word.startswith(prefix):
        raise ValueError(word)
    return word[len(prefix) :]


def _hosts(text: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _words(text))


def _truth(text: str) -> bool:
    if text not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text in ("true", "1")


_SECRET = "whsec_ and the base64 of 24 to 64 bytes, or several of these, separated by commas"

_VARIABLES: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "TRELLIS2_DATA": ("data", Path, "a folder"),
    "TRELLIS2_REDIS": ("redis", _redis, "an address such as redis://host:6379/0, or rediss:// with TLS"),
    "TRELLIS2_STORAGE": ("storage", _storage, "a folder, or an address such as s3://bucket/folder"),
    "TRELLIS2_LEASE_SECONDS": ("lease_seconds", _between(float, 1, 3600), "a number of seconds from 1 to 3600"),
    "TRELLIS2_HOST": ("host", str, "an address"),
    "TRELLIS2_PORT": ("port", _between(int, 1, 65535), "a whole number from 1 to 65535"),
    "TRELLIS2_QUEUE": ("queue_limit", _between(int, 1, 100_000), "a whole number from 1 to 100000"),
    "TRELLIS2_JOB_SECONDS": ("job_seconds", _between(float, 1, 1e6), "a number of seconds from 1 to 1000000"),
    "TRELLIS2_KEEP_HOURS": ("keep_hours", _between(float, 0.1, 1e6), "a number of hours from 0.1 to 1000000"),
    "TRELLIS2_KEEP_GB": ("keep_gigabytes", _between(float, 0.1, 1e6), "a number of gigabytes from 0.1 to 1000000"),
    "TRELLIS2_API_KEYS": ("api_keys", _keys, "one key or several, separated by commas"),
    "TRELLIS2_CORS_ORIGINS": ("cors_origins", _words, "origins such as https://example.com, separated by commas"),
    "TRELLIS2_WEBHOOK_SECRET": ("webhook_secrets", _secrets, _SECRET),
    "TRELLIS2_WEBHOOK_HOSTS": ("webhook_hosts", _hosts, "names of hosts, separated by commas"),
    "TRELLIS2_WEBHOOK_PRIVATE": ("webhook_private", _truth, "true or false"),
}
