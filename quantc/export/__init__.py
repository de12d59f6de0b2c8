"""Other containers that a finished checkpoint is written to."""
