"""HTML pages and plots: the report of a run, the curve of quality against size."""
