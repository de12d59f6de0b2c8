"""How a model comes in: `open_model(name)` gives a Source, whose weights stay on disk until they are asked for."""

from .resolve import open_model
from .source import COMPUTE_DTYPE, Source, model_files, set_parameter, to_meta

__all__ = ["COMPUTE_DTYPE", "Source", "model_files", "open_model", "set_parameter", "to_meta"]
