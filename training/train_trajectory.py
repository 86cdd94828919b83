"""Train a consistency trajectory model (CTM), which jumps between any two noise levels.

For users with images of their own or a dataset from the Hub. ctm distils a diffusion model
(--pretrained_teacher_model), or trains without a teacher. The example trains the teacher first:

    python training/train_diffusion.py --config training/configs/mnist_diffusion_small.yaml
    python training/train_trajectory.py --config training/configs/mnist_ctm_small.yaml

The same command resumes a stopped run. `cm-diffusers recipes` lists all recipes for --config.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["ctm"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
