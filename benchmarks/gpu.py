"""Runs the GPU measurements of `benchmarks.speed.gpu`: `python -m benchmarks.gpu`."""

import sys

from benchmarks.speed.gpu import main

if __name__ == "__main__":
    sys.exit(main())
