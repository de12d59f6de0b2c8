"""Pure tensor maths: no modules, no files, no models."""
