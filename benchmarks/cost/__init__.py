"""What quantizing costs: time and memory."""
