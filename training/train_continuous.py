"""Train a continuous-time consistency model (sCT, sCD) or a MeanFlow model, which sample in one or two steps.

For users with images of their own or a dataset from the Hub. sct and mean_flow train from scratch or from a saved
model; scd distils a diffusion model (--pretrained_teacher_model). The example trains the teacher first:

    python training/train_diffusion.py --config training/configs/mnist_trigflow_small.yaml
    python training/train_continuous.py --config training/configs/mnist_scd_small.yaml

The same command resumes a stopped run. `cm-diffusers recipes` lists all recipes for --config.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["sct", "scd", "mean_flow"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
