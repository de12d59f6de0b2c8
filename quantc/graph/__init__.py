"""The structure of a model, derived by running it; and exact rewrites of its blocks."""
