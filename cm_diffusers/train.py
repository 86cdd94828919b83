"""The word `train` for `accelerate launch -m cm_diffusers.train ...` and `torchrun -m cm_diffusers.train ...`."""

import sys

from cm_diffusers.cli import main


if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
