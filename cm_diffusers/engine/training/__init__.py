"""Training runs: from settings through checkpoints to a saved pipeline."""
