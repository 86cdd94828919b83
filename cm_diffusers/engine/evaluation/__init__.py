"""Models, folders of images and checkpoints measured against a dataset."""
