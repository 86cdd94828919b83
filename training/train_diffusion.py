"""Train a diffusion model (EDM or CDM), for its own use or as the teacher or start of a few-step model.

For users with images of their own or a dataset from the Hub who need a teacher for cd, ecd, scd or ctm.

    python training/train_diffusion.py --config training/configs/mnist_diffusion_small.yaml
    python training/train_diffusion.py --train_data_dir my_images --resolution 32 --output_dir runs/mine

The same command resumes a stopped run. `cm-diffusers recipes` lists all recipes for --config.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["diffusion", "cdm"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
