"""The programs of this folder, for a few seconds each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "name", ["many_requests", "kill_nine", "hostile_uploads", "disk_full", "openapi_fuzz", "two_workers", "health"]
)
def test_smoke(name: str) -> None:
    if name == "openapi_fuzz" and not (os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis")):
        pytest.skip("needs schemathesis: see openapi_fuzz.py")
    command = [sys.executable, HERE / f"{name}.py", "--smoke"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode == 77:
        pytest.skip("needs the right to mount a tmpfs in a namespace")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout
