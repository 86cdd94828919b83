"""Train a consistency trajectory model (CTM), which jumps between any two noise levels, with a teacher or without.

    python training/train_diffusion.py --config training/configs/mnist_diffusion_small.yaml
    python training/train_trajectory.py --config training/configs/mnist_ctm_small.yaml

The same command resumes a run that was stopped.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["ctm"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
