"""Settings from the environment, and that api.py lists them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trellis2.errors import InputError
from trellis2.options import VIDEO_VARIABLES
from trellis2.service.settings import _VARIABLES, Settings, settings_from_environment

API = Path(__file__).parents[2] / "api.py"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_VARIABLES, *VIDEO_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def test_defaults() -> None:
    assert settings_from_environment() == Settings()


def test_all_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "TRELLIS2_DATA": "/data",
        "TRELLIS2_HOST": "0.0.0.0",
        "TRELLIS2_PORT": "80",
        "TRELLIS2_REDIS": "rediss://:password@redis.example:6380/1",
        "TRELLIS2_STORAGE": "s3://bucket/folder",
        "TRELLIS2_LEASE_SECONDS": "5",
        "TRELLIS2_API_KEYS": "a, b",
        "TRELLIS2_CORS_ORIGINS": "https://a.example",
        "TRELLIS2_QUEUE": "3",
        "TRELLIS2_KEEP_HOURS": "0.5",
        "TRELLIS2_KEEP_GB": "7",
        "TRELLIS2_JOB_SECONDS": "60",
        "TRELLIS2_WEBHOOK_SECRET": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz, whsec_QUJDREVGR0hJSktMTU5PUFFSU1RVVldY",
        "TRELLIS2_WEBHOOK_HOSTS": "Hooks.example, receiver:3000",
        "TRELLIS2_WEBHOOK_PRIVATE": "true",
        "TRELLIS2_VIDEO_FRAMES": "8",
    }.items():
        monkeypatch.setenv(name, text)
    assert settings_from_environment() == Settings(
        data=Path("/data"),
        host="0.0.0.0",
        port=80,
        redis="rediss://:password@redis.example:6380/1",
        storage="s3://bucket/folder",
        lease_seconds=5.0,
        api_keys=("a", "b"),
        cors_origins=("https://a.example",),
        queue_limit=3,
        keep_hours=0.5,
        keep_gigabytes=7.0,
        job_seconds=60.0,
        webhook_secrets=(b"012345678901234567890123", b"ABCDEFGHIJKLMNOPQRSTUVWX"),
        webhook_hosts=("hooks.example", "receiver:3000"),
        webhook_private=True,
        video={"video_frames": 8},
    )


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("TRELLIS2_PORT", "http", "TRELLIS2_PORT='http' must be a whole number from 1 to 65535."),
        ("TRELLIS2_REDIS", "http://:password@host", "TRELLIS2_REDIS must be an address such as redis://host:6379/0"),
        ("TRELLIS2_STORAGE", "", "TRELLIS2_STORAGE='' must be a folder, or an address such as s3://bucket/folder."),
        ("TRELLIS2_QUEUE", "0", "TRELLIS2_QUEUE='0' must be a whole number from 1 to 100000."),
        ("TRELLIS2_KEEP_GB", "nan", "TRELLIS2_KEEP_GB='nan' must be a number of gigabytes from 0.1 to 1000000."),
        ("TRELLIS2_API_KEYS", "", "TRELLIS2_API_KEYS='' must be one key or several, separated by commas."),
        ("TRELLIS2_JOB_SECONDS", "0", "TRELLIS2_JOB_SECONDS='0' must be a number of seconds from 1 to 1000000."),
        ("TRELLIS2_WEBHOOK_PRIVATE", "", "TRELLIS2_WEBHOOK_PRIVATE='' must be true or false."),
        ("TRELLIS2_WEBHOOK_SECRET", "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz", "TRELLIS2_WEBHOOK_SECRET must be whsec_ and"),
        ("TRELLIS2_WEBHOOK_SECRET", "whsec_c2hvcnQ=", "TRELLIS2_WEBHOOK_SECRET must be whsec_ and the base64 of 24 to"),
        ("TRELLIS2_WEBHOOK_SECRET", "whsec_???", "TRELLIS2_WEBHOOK_SECRET must be whsec_ and the base64 of 24 to"),
        ("TRELLIS2_VIDEO_FRAMES", "many", "TRELLIS2_VIDEO_FRAMES='many' must be a whole number."),
    ],
)
def test_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch, name: str, text: str, sentence: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=re.escape(sentence)):
        settings_from_environment()


def test_api_py_lists_them() -> None:
    listed = re.findall(r"^    (TRELLIS2_\w+) ", API.read_text(), re.MULTILINE)
    pipelines = {"TRELLIS2_MODEL", "TRELLIS2_MATTING", "TRELLIS2_GPU_MEMORY"}
    assert set(listed) == {*pipelines, *_VARIABLES, *VIDEO_VARIABLES}
