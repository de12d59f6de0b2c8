"""The calibration set: its tokens, and their way through the model block by block."""
