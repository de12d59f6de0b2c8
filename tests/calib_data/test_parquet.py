"""Parquet files: through a stand-in for pyarrow, and the real one where it is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantc.calib_data import load_documents
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
        values = self.columns[columns[0]]
        return type("Table", (), {"column": lambda _, name: type("Column", (), {"to_pylist": lambda _: values})()})()


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
@pytest.mark.parametrize("content", ['{"id": [1], "body": ["x"]}', '{"id": [1], "text": [7]}'])
def test_parquet_without_a_text_column(tmp_path: Path, content: str, message_of: MessageOf) -> None:
    path = tmp_path / "a.parquet"
    path.write_text(content)
    names = ", ".join(repr(name) for name in json.loads(content))
    assert message_of(CalibrationError, path) == (
        f'Calibration file {path} has no column "text" of strings but {names}; '
        f'one is needed: rename the column that holds the text to "text".'
    )


@pytest.mark.usefixtures("fake_pyarrow")
def test_damaged_parquet(tmp_path: Path, message_of: MessageOf) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("PAR")
    assert message_of(CalibrationError, path) == (
        f"Calibration file {path} is not valid parquet (FakeArrowException: no magic bytes); "
        f"write or download the file again."
    )


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message_of: MessageOf) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.touch()
    assert message_of(CalibrationError, path) == (
        f"Calibration file {path} is read through the library 'pyarrow', which is not installed; "
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
