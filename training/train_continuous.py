"""Train a continuous-time consistency model (sCT, sCD) or a MeanFlow model, which make images in one or two steps.

    python training/train_diffusion.py --config training/configs/mnist_trigflow_small.yaml
    python training/train_continuous.py --config training/configs/mnist_scd_small.yaml

The same command resumes a run that was stopped.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["sct", "scd", "mean_flow"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
