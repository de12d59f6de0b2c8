"""Rows of a weight that a mask marks: taken out, and put back."""

from __future__ import annotations

import torch


def take_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return (..., M, C): the M rows of values (..., N, C) that rows, bool (..., N), marks for each leading index."""
    *leading, _, columns = values.shape
    return values[rows].reshape(*leading, int(rows.sum()) // leading_count(rows), columns)


def put_rows(rows: torch.Tensor, marked: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return (..., N, C): inverse of `take_rows` for the rows that are marked, and for those that are not."""
    values = marked.new_empty(*rows.shape, marked.shape[-1])
    values[rows] = marked.flatten(0, -2)
    values[~rows] = others.flatten(0, -2)
    return values


def leading_count(rows: torch.Tensor) -> int:
    """Return how many weights (experts) a mask (..., N) is for."""
    return torch.Size(rows.shape[:-1]).numel()
