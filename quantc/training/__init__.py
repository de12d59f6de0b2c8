"""Training of what was rounded: block by block, and the whole model at once."""
