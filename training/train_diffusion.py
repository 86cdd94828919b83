"""Train a diffusion model (EDM, or CDM), by itself or as the start of a consistency model.

    python training/train_diffusion.py --config training/configs/mnist_diffusion_small.yaml
    python training/train_diffusion.py --train_data_dir my_images --resolution 32 --output_dir runs/mine

The same command resumes a run that was stopped.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["diffusion", "cdm"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
