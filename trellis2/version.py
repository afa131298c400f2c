"""The package's version; pyproject.toml reads it from here, so that it is known without an installation."""

from __future__ import annotations

VERSION = "0.1.0"
