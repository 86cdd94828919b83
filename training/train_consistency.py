"""Train a consistency model, which samples images in one or two steps.

For users with images of their own or a dataset from the Hub. ect, ct and ict train from scratch or from a saved
model; cd, lcm, tcd and ecd distil a diffusion model (--pretrained_teacher_model).

    python training/train_consistency.py --config training/configs/digits_ect.yaml
    python training/train_consistency.py --method ect --train_data_dir my_images --resolution 32 \\
        --model_preset base --max_train_steps 100000 --output_dir runs/mine

The same command resumes a stopped run. `cm-diffusers recipes` lists all recipes for --config.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["ect", "ct", "ict", "cd", "lcm", "tcd", "ecd"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
