"""How well models come out: KL divergence and perplexity of presets, recipes, plans and other tools."""
