"""Which deqkern this is."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """The version of deqkern, or why there is none."""
    try:
        return importlib.metadata.version("deqkern")
    except importlib.metadata.PackageNotFoundError:
        return "not installed, imported from its sources"
