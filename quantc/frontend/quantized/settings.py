"""The entries of a quantization_config, checked one by one as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...files.untrusted import describe, fits

CONFIG = "quantization_config in config.json"


class Settings:
    """A mapping from a model folder. place: what to call it in an error, such as CONFIG."""

    def __init__(self, folder: Path, content: dict[str, Any], place: str = CONFIG):
        self.folder, self.content, self.place = folder, content, place

    def get(self, key: str, hint: Any, default: Any = None) -> Any:
        """Return an entry, or the default where it is missing or null; raises ModelError for one of another type."""
        value = self.content.get(key)
        if value is None:
            return default
        if not fits(value, hint):
            raise self.wrong(key, describe(hint))
        return value

    def need(self, key: str, hint: Any) -> Any:
        """Return an entry that must be there; raises ModelError."""
        value = self.get(key, hint)
        if value is None:
            raise ModelError(
                f"{self.folder}: {self.place} has no {key}, without which the weights cannot be read; use the config "
                "that belongs to the weights."
            )
        return value

    def bits(self, key: str = "bits") -> int:
        """Return a width of codes that must be there; raises ModelError for none of 2 to 8."""
        value = int(self.need(key, int))
        if not 2 <= value <= 8:
            raise self.wrong(key, "a number of bits from 2 to 8")
        return value

    def group_size(self, key: str = "group_size") -> int:
        """Return the columns of a group, 0 for whole rows (stored as -1 or null); raises ModelError."""
        value = int(self.get(key, int, -1))
        if value != -1 and value < 1:
            raise self.wrong(key, "a group size of at least 1, or -1 for whole rows")
        return max(value, 0)

    def inside(self, key: str) -> Settings | None:
        """Return the mapping that an entry is, None where it is missing; raises ModelError."""
        content = self.get(key, dict[str, Any])
        return None if content is None else Settings(self.folder, content, f"{key} of {self.place}")

    def each(self) -> Iterator[tuple[str, Settings]]:
        """Yield every entry with the mapping that it is; raises ModelError for one that is none."""
        for key in self.content:
            inner = self.inside(key)
            if inner is None:
                raise self.wrong(key, "a mapping")
            yield key, inner

    def over(self, changes: Settings) -> Settings:
        """Return these settings with some changed."""
        return Settings(self.folder, {**self.content, **changes.content}, self.place)

    def wrong(self, key: str, needed: str) -> ModelError:
        """Return the error for an entry that is not what is needed."""
        return ModelError(
            f"{self.folder}: {self.place} says {key} {self.content[key]!r}, but {needed} is needed; use the config "
            "that belongs to the weights."
        )

    def unread(self, what: str) -> ModelError:
        """Return the error for a feature that the reader has no code for."""
        return ModelError(
            f"{self.folder} is already quantized with {what}, which quantc does not read; start from the original, "
            "unquantized model."
        )
