"""Evaluation of models, folders of images and checkpoints against a dataset."""
