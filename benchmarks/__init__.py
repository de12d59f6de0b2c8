"""Benchmarks; each runs as `python -m benchmarks.NAME` from the checkout's root and explains itself with --help."""
