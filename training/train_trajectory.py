"""Train a consistency trajectory model (CTM), which jumps between any two noise levels, with a teacher or without.

    python training/train_diffusion.py --config training/configs/mnist_diffusion_small.yaml
    python training/train_trajectory.py --config training/configs/mnist_ctm_small.yaml

The same command resumes a run that was stopped.
"""

from cm_diffusers.engine.training.run import main


METHODS = ["ctm"]

if __name__ == "__main__":
    main(None, METHODS, __doc__)
