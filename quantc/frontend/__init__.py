"""How a model comes in: `open_model(name)` gives a Source, whose weights stay on disk until they are asked for."""

from .resolve import open_model
from .source import Source, model_files, to_meta

__all__ = ["Source", "model_files", "open_model", "to_meta"]
