"""Compares what a config asks for with what the weight files hold, before anything is built as large as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from ..files.untrusted import fits, read_json

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 10_000  # the deepest published decoders have fewer than 200; configs make lists with an entry for each
SIDES = (
    "hidden_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
)  # none exceeds a weight's longest side


def context_limit(config: Any) -> int | None:
    """Return how many positions a model's config says that it has, None where it says nothing."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def check_config_file(file: Path) -> None:
    """Raise ModelError for a config.json that transformers would choke on: damaged, too deep, or of endless layers."""
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file.parent}: config.json is not one that transformers can use ({error}); fetch or save it again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.parent}: config.json is no mapping of settings; fetch or save it again.")
    if not fits(content.get("architectures"), list[str] | None):
        raise ModelError(
            f"{file.parent}: config.json says architectures {content['architectures']!r}, but a list of names is "
            "needed; fetch or save it again."
        )
    for name, count in layer_counts(content):
        if not isinstance(count, int) or not 0 <= count <= MOST_LAYERS:
            raise ModelError(
                f"{file.parent}: config.json says {name} {count!r}, but a number from 0 to {MOST_LAYERS} is needed; "
                "use the config that belongs to the weights."
            )


def check_sizes(config: Any, files: list[Path]) -> None:
    """Raise ModelError where a config asks for more layers than the files have tensors, or for sides that none has.

    Files that cannot be read or are empty are left to whoever reads them.
    """
    try:
        tensors, longest = _measure(files)
    except (SafetensorError, OSError):
        return
    if not tensors:
        return
    folder, text = files[0].parent, config.get_text_config()
    settings = text.to_dict()
    for name, count in layer_counts(config.to_dict()):
        if isinstance(count, int) and count > tensors:
            raise ModelError(
                f"{folder}: config.json says {name} {count}, but the weight files hold {tensors} tensors, fewer than "
                "one a layer; a config that belongs to the weights is needed."
            )
    for name in SIDES:
        side = settings.get(text.attribute_map.get(name, name))
        if isinstance(side, int) and not 0 < side <= longest:
            raise ModelError(
                f"{folder}: config.json says {name} {side}, but the longest side of a tensor in the weight files is "
                f"{longest}; a config that belongs to the weights is needed."
            )


def layer_counts(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the layer counts of the model and of the models inside it, such as a text and a vision one."""
    for name, value in settings.items():
        if name in LAYER_COUNTS and value is not None:
            yield name, value
        elif isinstance(value, dict):
            yield from layer_counts(value)


def _measure(files: list[Path]) -> tuple[int, int]:
    """Return how many tensors the files hold, and the longest side that one of them has."""
    tensors = longest = 0
    for file in files:
        with safe_open(file, framework="pt") as shard:
            shapes = [shard.get_slice(name).get_shape() for name in shard.keys()]  # noqa: SIM118  no mapping
        tensors += len(shapes)
        longest = max([longest, *(side for shape in shapes for side in shape)])
    return tensors, longest
