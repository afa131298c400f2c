"""What the service does, against what its own OpenAPI says:

    python -m venv /tmp/schemathesis && /tmp/schemathesis/bin/pip install 'schemathesis>=4.32,<5'
    SCHEMATHESIS=/tmp/schemathesis/bin/schemathesis python tests/load/openapi_fuzz.py [--smoke]

All checks of schemathesis, with the real application and a stand-in for the model: once open to all, once with a key,
once with webhooks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import STUB, figures, running, toy, verdict

HERE = Path(__file__).resolve().parent
KEY = "a-key-for-this-run"


def fuzz(program: str, port: int, key: str | None, examples: int, folder: Path) -> subprocess.CompletedProcess[str]:
    address = f"http://127.0.0.1:{port}"
    command = [program, "run", f"{address}/openapi.json", "--url", address, "--checks", "all", "--no-color"]
    command += ["--max-examples", str(examples), "--seed", "1", "--request-timeout", "30", "--continue-on-failure"]
    if key is not None:
        (folder / "schemathesis.toml").write_text(f'[auth.openapi.HTTPBearer]\nbearer = "{key}"\n')
    picture = folder / "toy.png"
    picture.write_bytes(toy())
    hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE), "PICTURE": str(picture)}
    return subprocess.run(command, cwd=folder, env=os.environ | hooks, capture_output=True, text=True, timeout=3600)


def main() -> None:
    smoke = "--smoke" in sys.argv[1:]
    program = os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis")
    if program is None:
        sys.exit(__doc__)
    wrong = []
    webhooks = {"TRELLIS2_WEBHOOK_SECRET": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz"}
    kinds: dict[str, dict[str, str]] = {"open": {}, "with a key": {"TRELLIS2_API_KEYS": KEY}, "with webhooks": webhooks}
    for kind in ("open",) if smoke else kinds:
        with tempfile.TemporaryDirectory() as folder:
            keys, key = kinds[kind], kinds[kind].get("TRELLIS2_API_KEYS")
            with running(Path(folder) / "data", STUB, STUB_SECONDS="0", TRELLIS2_QUEUE="100000", **keys) as service:
                start = time.monotonic()
                result = fuzz(program, service.port, key, 3 if smoke else 100, Path(folder))
                cases = re.search(r"([\d,]+) generated", result.stdout)
                figures(
                    service=kind,
                    requests=cases.group(1) if cases else "?",
                    seconds=round(time.monotonic() - start),
                    exit_status=result.returncode,
                )
                if result.returncode or cases is None:
                    wrong.append(f"schemathesis says:\n{result.stdout[-20000:]}\n{result.stderr[-2000:]}")
                if service.process.poll() is not None:
                    wrong.append("the service died")
    verdict(wrong)


if __name__ == "__main__":
    main()
