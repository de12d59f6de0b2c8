"""Packed checkpoints in memory: loading, modules, compiled decoding. Knows nothing of quantizing."""
