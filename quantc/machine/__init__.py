"""This machine: its memory, its fast dtypes, and how long things take on it."""
