"""Saved models: read as a start or teacher of training, and written and verified."""
