"""Training, evaluation, data, checkpoints and publication: everything behind the scripts in `training/`."""
