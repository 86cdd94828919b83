"""Runs that distil text-to-image models: prompts, data, results and cards."""
