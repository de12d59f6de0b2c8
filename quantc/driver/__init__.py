"""One run from settings to checkpoint. Start at job.py: it is the run on one page."""
