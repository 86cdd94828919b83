"""Saved models: read as what training starts from or learns from, written and verified."""
