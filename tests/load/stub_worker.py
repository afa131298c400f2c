"""A worker of the service, with the stand-in of stub_service.py for the model; settings as there and in worker.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from stub_service import stand_in

stand_in()
sys.argv = ["worker.py"]
runpy.run_path(str(Path(__file__).resolve().parents[2] / "worker.py"), run_name="__main__")
