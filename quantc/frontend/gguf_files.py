"""GGUF files as gguf-py reads their headers: one file, or all parts of one that was split."""

from __future__ import annotations

import re
import struct
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..errors import ModelError
from .weight_files import some

if TYPE_CHECKING:
    from gguf import GGUFReader

    Array = np.ndarray[Any, Any]

PART = re.compile(r"-(\d{5})-of-(\d{5})$")  # ends the stem of a part's name
RENAME = "give all parts their names back, such as name-00001-of-00002.gguf"


def parts_of(file: Path) -> list[Path]:
    """Return all parts of the GGUF file this one belongs to, in order; raises ModelError that names missing ones."""
    found = PART.search(file.stem)
    if found is None or not int(found[2]):
        return [file]
    stem, count = file.stem[: found.start()], int(found[2])
    parts = [file.with_name(f"{stem}-{number:05d}-of-{found[2]}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(
            f"{file} is one of {count} parts, but not all are beside it: {some(missing)} missing; fetch the rest."
        )
    return parts


def open_parts(files: list[Path]) -> tuple[GGUFReader, dict[str, Path]]:
    """Return a reader of all parts (the first one's, with the tensors of all), and tensor name -> its file.

    Raises ModelError where they are not the parts of one file.
    """
    readers = [open_reader(file) for file in files]
    for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
        _check_part(file, reader, number, len(files))
    counts = [_number(reader, "split.tensors.count") for reader in readers]
    for file, count in zip(files, counts, strict=True):
        if count != counts[0]:
            raise _of_several(files, f"{files[0].name} says {counts[0]} tensors, and {file.name} {count}")
    places: dict[str, Path] = {}
    for file, each in zip(files, readers, strict=True):
        for tensor in each.tensors:
            if tensor.name in places:
                raise _of_several(files, f"{tensor.name} is in {places[tensor.name].name} and in {file.name}")
            places[tensor.name] = file
    readers[0].tensors = [tensor for each in readers for tensor in each.tensors]
    return readers[0], places


def _check_part(file: Path, reader: GGUFReader, number: int, count: int) -> None:
    """Raise ModelError where a file says that it is another part than its name does."""
    parts, own = _number(reader, "split.count"), _number(reader, "split.no")
    if parts is not None and max(1, parts) != count:
        raise ModelError(f"{file} is one of {parts} parts, but {count} were found by their names; {RENAME}.")
    if own is not None and own != number:
        raise ModelError(f"{file} says that it is part {own + 1}, and its name that it is part {number + 1}; {RENAME}.")


def _of_several(files: list[Path], why: str) -> ModelError:
    return ModelError(f"{files[0]} and its other parts are not of one file: {why}; fetch all of them again.")


def _number(reader: GGUFReader, name: str) -> int | None:
    field = reader.fields.get(name)
    return None if field is None else int(field.parts[-1][0])


def open_reader(file: Path) -> GGUFReader:
    """Return gguf-py's reader of a file; raises ModelError where the package is missing or the file is damaged."""
    try:
        kind = _reader_class()
    except ImportError as error:
        raise ModelError(f"{file} needs the package gguf, which is not installed; run `pip install gguf`.") from error
    try:
        reader: GGUFReader = kind(str(file))
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except Exception as error:  # the package checks little: RecursionError, UnicodeDecodeError and others come too
        raise ModelError(f"{file} is not a readable GGUF file ({error}); fetch it again.") from error
    if reader.byte_order == "S":
        raise ModelError(
            f"{file} has the byte order of other processors; convert it with `gguf-convert-endian {file} native`."
        )
    return reader


def _reader_class() -> type[GGUFReader]:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
    from gguf.gguf_reader import ReaderField

    class Reader(GGUFReader):
        """Reads long lists as one: gguf-py makes two arrays of every token, 0.3 GB for a vocabulary of 262,144."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)  # numpy's memmap adds 3 us to each of a million slices

        def _build_fields(self, offs: int, count: int) -> int:
            for _ in range(count):
                kind = offs + 8 + int(self._get(offs, np.uint64)[0])  # behind the name
                offs = self._list_field(offs, kind) or super()._build_fields(offs, 1)
            return offs

        def _list_field(self, start: int, kind: int) -> int:
            """Add a field if it is a list of texts or numbers, and return where it ends; else return 0."""
            if self._get(kind, np.uint32)[0] != GGUFValueType.ARRAY:
                return 0
            inner, count = self._get(kind + 4, np.uint32), self._get(kind + 8, np.uint64)
            types = [GGUFValueType.ARRAY, GGUFValueType(inner[0])]
            if int(count[0]) < 2 or types[1] == GGUFValueType.ARRAY:
                return 0
            name = self._get(start + 8, np.uint8, kind - start - 8)
            head = [self._get(start, np.uint64), name, self._get(kind, np.uint32), inner, count]
            items = self._items(types[1], head, kind + 16)
            field = ReaderField(start, str(bytes(name), encoding="utf-8"), items, items.data, types)  # type: ignore[arg-type]
            self._push_field(field, skip_sum=True)
            return items.end

        def _items(self, kind: GGUFValueType, head: list[Array], start: int) -> _Items:
            if kind == GGUFValueType.STRING:
                return _Texts(head, self.data, start, self.byte_order)
            dtype = np.dtype(self.gguf_scalar_to_np[kind])
            _check_end(start + int(head[-1][0]) * dtype.itemsize, self.data)
            return _Numbers(head, self._get(start, dtype, head[-1][0]), start)

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            for field in fields:
                if int(field.parts[4][0]) not in set(GGMLQuantizationType):
                    raise ModelError(
                        f"the tensor {field.name} has type {int(field.parts[4][0])}, which this version of the package "
                        "gguf does not know; run `pip install --upgrade gguf`, or use a file of another type."
                    )
            super()._build_tensors(start_offs, fields)

    return Reader


def _check_end(offset: int, data: Array) -> None:
    if offset > len(data):
        raise ValueError("a list reaches beyond the end")


class _Items(Sequence["Array"]):
    """The parts of a field that is a list, each made when it is asked for, as gguf-py makes them.

    head: those before the items. behind: how many the items have. end: where the list ends in the file.
    """

    head: list[Array]
    behind: int
    end: int

    @property
    @abstractmethod
    def data(self) -> range:
        """Return the places of the items' contents among the parts."""

    @abstractmethod
    def item(self, index: int) -> Array:
        """Return a part behind the head."""

    def __len__(self) -> int:
        return len(self.head) + self.behind

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self.head[at] if at < len(self.head) else self.item(at - len(self.head))


class _Numbers(_Items):
    """A list of numbers, each a part."""

    def __init__(self, head: list[Array], values: Array, start: int):
        self.head, self.behind, self.end = head, len(values), start + values.nbytes
        self._values = values

    @property
    def data(self) -> range:
        return range(len(self.head), len(self))

    def item(self, index: int) -> Array:
        return self._values[index : index + 1]


class _Texts(_Items):
    """A list of texts, each two parts: its length and its bytes."""

    def __init__(self, head: list[Array], content: Array, start: int, order: str):
        count = int(head[-1][0])
        _check_end(start + 8 * count, content)
        self.head, self.behind, self._content = head, 2 * count, content
        self._starts = np.empty(count + 1, dtype=np.int64)
        length = struct.Struct("=Q" if order == "I" else ">Q")
        for index in range(count):
            self._starts[index] = start
            start += 8 + length.unpack_from(content.data, start)[0]
        _check_end(start, content)
        self._starts[count] = self.end = start

    @property
    def data(self) -> range:
        return range(len(self.head) + 1, len(self), 2)

    def item(self, index: int) -> Array:
        start, end = self._starts[index // 2], self._starts[index // 2 + 1]
        return self._content[start + 8 : end] if index % 2 else self._content[start : start + 8].view(np.uint64)
