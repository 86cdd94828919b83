"""Helpers for tests in several folders: training runs, models, checkpoints, disks and a Hub."""
