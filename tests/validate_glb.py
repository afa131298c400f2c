"""The Khronos glTF validator, which scripts/test installs into tests/node_modules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_SCRIPT = """
const bytes = new Uint8Array(require("fs").readFileSync(process.argv[1]));
require("gltf-validator").validateBytes(bytes, {maxIssues: 100}).then(
  (report) => process.stdout.write(JSON.stringify(report.issues)),
  (error) => { process.stderr.write(String(error)); process.exit(1); });
"""


def validate(path: Path) -> dict[str, Any]:
    """Return the numbers of "errors", "warnings", "infos" and "hints" of a GLB, and its "messages".

    Raises RuntimeError where node or the validator is not installed: a test must not pass without them.
    """
    node = shutil.which("node")
    folder = Path(__file__).parent
    if node is None or not (folder / "node_modules" / "gltf-validator").is_dir():
        raise RuntimeError("The Khronos validator is not installed: install node and run `npm ci` in tests/.")
    command = [node, "-e", _SCRIPT, str(path.absolute())]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    if result.returncode:
        raise RuntimeError(f"The validator could not read {path}: {result.stderr}")
    issues = json.loads(result.stdout)
    counts = {name: issues[f"num{name.capitalize()}"] for name in ("errors", "warnings", "infos", "hints")}
    return {**counts, "messages": [f"{m['code']} {m['pointer']}" for m in issues["messages"]]}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        sys.stdout.write(f"{name}: {json.dumps(validate(Path(name)))}\n")
