"""The command line. `main` is the entry point; everything heavy is imported inside the commands."""

from __future__ import annotations

from .commands import main

__all__ = ["main"]
