"""A run: from settings to a saved pipeline, through checkpoints."""
