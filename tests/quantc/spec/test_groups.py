"""Groups: which weights share parameters, whatever the grid."""

from __future__ import annotations

from typing import Any

import pytest

from quantc.errors import UsageError
from quantc.spec import LARGEST_COUNT, WHOLE_ROW, Groups


@pytest.mark.parametrize("size", [0, -2, 1.5, "8", True, LARGEST_COUNT + 1])
def test_a_size_that_is_none_is_named(size: Any) -> None:
    with pytest.raises(UsageError, match=r"group_size is"):
        Groups(size)


def test_an_unknown_grouping_is_named() -> None:
    with pytest.raises(UsageError, match=r"grouping is 'per_row', but only per_oc and per_ic exist"):
        Groups(8, "per_row")  # type: ignore[arg-type]


def test_only_groups_along_the_outputs_keep_rows_together() -> None:
    assert Groups(4).rows_together((10, 8)) == 1
    assert Groups(4, "per_ic").rows_together((10, 8)) == 4
    assert Groups(WHOLE_ROW, "per_ic").rows_together((10, 8)) == 10


def test_labels() -> None:
    assert (Groups(64).size_label(), Groups(WHOLE_ROW).size_label()) == ("g64", "grow")
    assert (Groups(64).label(), Groups(64, "per_ic").label()) == ("", "-per_ic")
