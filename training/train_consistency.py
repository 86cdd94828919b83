"""Train a consistency model, which makes images in one or two steps.

    python training/train_consistency.py --config training/configs/digits_ect.yaml
    python training/train_consistency.py --method ect --train_data_dir my_images --resolution 32 \\
        --model_preset base --max_train_steps 100000 --output_dir runs/mine

The same command resumes a run that was stopped.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
from cm_diffusers.engine.training.run import main


METHODS = ["ect", "ct", "ict", "cd", "ecd"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
