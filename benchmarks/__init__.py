"""Scripts that measure: quality, speed and cost. Each prints ratios against something measured in the same run."""
