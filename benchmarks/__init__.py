"""Scripts that measure; each prints ratios against something timed in the same run."""
