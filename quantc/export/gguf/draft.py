"""A file before the types of its weights are chosen: what it will say, its tensors, and the room that these leave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ...errors import ModelError
from ...frontend import Source
from ...frontend.gguf import GgufSource
from .file import header_bytes
from .layout import FileTensor, ModelTensor, lay_out
from .metadata import Described, describe_file, describe_storage
from .mixes import mixed
from .origin import copy_metadata, parts_as
from .tokenizer import UnknownTokenizer

APART = "write a checkpoint (--target gguf, and a folder as --out) and export that with"


@dataclass(frozen=True)
class Draft:
    """What a file says, and its tensors as floats, or as they are in the file that the model comes from."""

    described: Described
    tensors: list[FileTensor]

    @classmethod
    def of(cls, source: Source) -> Draft:
        """Return the draft for a model; raises ModelError for what llama.cpp does not know."""
        described = _describe(source)
        if described.table is None:
            assert isinstance(source, GgufSource)
            return cls(described, parts_as(source))
        shapes = {name: tuple(t.shape) for name, t in source.model.state_dict().items() if name not in source.tied}
        floats = {name: ModelTensor(shape, source.stored_dtype(name)) for name, shape in shapes.items()}
        return cls(described, lay_out(floats, described.table, source.model.config))

    @cached_property
    def header(self) -> int:
        """Bytes before the tensors, whatever their types are."""
        said = self.described.metadata | describe_storage(self.tensors)
        return header_bytes(self.described.architecture, said, self.tensors)

    def bytes_of(self, tensors: Iterable[FileTensor]) -> int:
        """Return the size of the file, to the byte, with these tensors in place of the draft's."""
        return self.header + sum(tensor.filled_bytes for tensor in tensors)

    def bytes_like(self, mix: str) -> int:
        """Return the size of the file that llama.cpp's quantizer would make; see `mixed`."""
        return self.bytes_of(mixed(self.tensors, self.described, mix))


def _describe(source: Source) -> Described:
    if isinstance(source, GgufSource):
        return copy_metadata(source)
    words = source.optional_tokenizer
    if words is None:
        raise ModelError(
            f"{source.path} has no tokenizer, but llama.cpp reads texts with the one in its file; copy tokenizer.json "
            f"there, or {APART} --no-tokenizer."
        )
    try:
        return describe_file(source.model.config, words, source.name)
    except UnknownTokenizer as error:
        raise ModelError(f"{error.found}; {APART} --no-tokenizer or --pre-tokenizer.") from error
