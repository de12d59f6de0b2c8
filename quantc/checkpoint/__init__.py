"""The packed checkpoint of docs/format.md: read, written, and taken up again after an interruption."""
