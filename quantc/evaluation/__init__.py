"""What a model is worth: perplexity, KL divergence from the original, decode speed."""
