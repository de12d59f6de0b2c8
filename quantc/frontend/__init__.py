"""How a model comes in: `open_model(name)` gives a Source, whose weights stay on disk until they are asked for."""

from .companions import model_files
from .resolve import open_model
from .source import Source, to_meta

__all__ = ["Source", "model_files", "open_model", "to_meta"]
