"""The command line. `main` is the entry point; everything heavy is imported inside the commands."""

from __future__ import annotations

from .checkpoint_commands import main  # behind the commands of commands.py, which --help lists first

__all__ = ["main"]
