"""What is compiled and what is launched, as data: the same launches run on a GPU and, in tests, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Argument = torch.Tensor | int | float | None


@dataclass(frozen=True)
class Program:
    """One entry point of a source in this folder, specialised by preprocessor definitions."""

    source: str  # file name, such as "decode.cu"
    entry: str  # name of the extern "C" __global__ function
    defines: tuple[tuple[str, int | str], ...] = ()


@dataclass(frozen=True)
class Launch:
    """A program with its grid and arguments.

    arguments, in the order of the entry's parameters: a tensor is passed as the address of its first element, None
    as a null pointer, an int as a 32-bit int, a float as a 32-bit float. shared: bytes of dynamic shared memory.
    """

    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Budget:
    """What a program may take on every architecture; spilling registers is never allowed.

    registers: per thread. shared_bytes: static shared memory per block. minimum_arch: the first that can run it, as
    in sm_80. everyday: compiled by the fast tests too; the others wait for the slow ones.
    """

    registers: int
    shared_bytes: int
    minimum_arch: int = 75
    everyday: bool = True
