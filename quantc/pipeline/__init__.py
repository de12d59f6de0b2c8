"""What passes are, what they share and work on, and the sweep that runs them over the blocks."""
