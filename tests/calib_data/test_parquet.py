"""Parquet files: through a stand-in for pyarrow, and the real one where it is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantc.calib_data import Conversation, load_documents
from quantc.errors import CalibrationError

MessageOf = Callable[..., str]


class FakeParquetFile:
    """Behaves as pyarrow.parquet.ParquetFile on a file that holds {"column": [values]} as JSON."""

    def __init__(self, stream: Any) -> None:
        try:
            self.columns = json.load(stream)
        except ValueError as error:
            raise FakeArrowException("no magic bytes\nmore") from error

    @property
    def schema_arrow(self) -> Any:
        return type("Schema", (), {"names": list(self.columns)})

    def read(self, columns: list[str]) -> Any:
        rows = [
            dict(zip(columns, row, strict=True)) for row in zip(*(self.columns[name] for name in columns), strict=True)
        ]
        return type("Table", (), {"to_pylist": lambda _: rows})()


class FakeArrowException(Exception):
    pass


@pytest.fixture
def fake_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    package.__dict__.update(ArrowException=FakeArrowException, parquet=parquet)
    parquet.__dict__.update(ParquetFile=FakeParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


@pytest.mark.usefixtures("fake_pyarrow")
def test_parquet_gives_its_text_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text('{"id": [1, 2, 3], "text": ["one", null, "two"]}')
    assert load_documents(str(path)) == ["one", "two"]


@pytest.mark.usefixtures("fake_pyarrow")
def test_parquet_gives_its_conversations(tmp_path: Path) -> None:
    path, talk, notes = tmp_path / "a.parquet", [{"role": "user", "content": "w3"}], list[str]()
    path.write_text(json.dumps({"id": [1, 2], "messages": [talk, None], "system": ["w9", "w9"]}))
    wanted = Conversation(({"role": "system", "content": "w9"}, *talk))
    assert load_documents(str(path), notes=notes) == [wanted]
    assert notes == [f"calibration file {path}: row 2 says nothing; 1 of 2 rows were skipped for that"]


@pytest.mark.usefixtures("fake_pyarrow")
@pytest.mark.parametrize("content", ['{"id": [1], "body": ["x"]}', '{"id": [1], "text": [7]}'])
def test_parquet_without_a_text_column(tmp_path: Path, content: str, message_of: MessageOf) -> None:
    path = tmp_path / "a.parquet"
    path.write_text(content)
    names = ", ".join(repr(name) for name in json.loads(content))
    why = 'has a "text" of type int' if "text" in content else f"has none of the fields that are read but {names}"
    assert message_of(CalibrationError, path) == (
        f'calibration file {path} has no column "text" of strings but {names} (a row {why}); one is needed, or a '
        'column "messages" or another one that the README lists: rename yours.'
    )


@pytest.mark.usefixtures("fake_pyarrow")
def test_damaged_parquet(tmp_path: Path, message_of: MessageOf) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("PAR")
    assert message_of(CalibrationError, path) == (
        f"calibration file {path} is not valid parquet (FakeArrowException: no magic bytes); "
        f"write or download the file again."
    )


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message_of: MessageOf) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.touch()
    assert message_of(CalibrationError, path) == (
        f"calibration file {path} is read through the library 'pyarrow', which is not installed; "
        f"run `pip install pyarrow`, or convert the file to .jsonl."
    )


def test_parquet_with_the_real_pyarrow(tmp_path: Path, message_of: MessageOf) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="comes with the extra quantc[data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    good, other, damaged = (tmp_path / f"{name}.parquet" for name in ("good", "other", "damaged"))
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", None]}), good)
    parquet.write_table(pyarrow.table({"body": ["x"]}), other)
    damaged.write_bytes(good.read_bytes()[:-9] + b"x" * 9)
    assert load_documents(str(good)) == ["one"]
    assert "has no column \"text\" of strings but 'body'" in message_of(CalibrationError, other)
    assert "is not valid parquet (ArrowInvalid: " in message_of(CalibrationError, damaged)
