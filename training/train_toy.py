"""Train a method on a toy problem in one or two dimensions, and compare it with the exact solution.

For developers and students of the methods. A run takes one to two minutes on one CPU core.

    python training/train_toy.py --task bimodal --method scd --output_dir runs/toy
    python training/train_toy.py --task three_gmm --method ctm --output_dir runs/toy_ctm

Writes toy.png, a picture of the result, and report.json with these measures:

    rms_error    root mean square distance of the learned from the exact function, over the noise marginal (1D only)
    wasserstein  Wasserstein distance of samples to the data for each sampler, see cm_diffusers.toys.trajectories
                 (ctm only)
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
import json
from pathlib import Path

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.places import make_folder
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.toys import TASKS
from cm_diffusers.toys.runs import OPTIONS, PICTURE, REPORT, ToyRun


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    parser = parser_of("train_toy", __doc__)
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="bimodal", help="Data distribution. Default: bimodal.")
    add("--method", choices=list(OPTIONS), default="scd", help="Method to train. Default: scd.")
    add(
        "--teacher",
        choices=["trained", "exact", "none"],
        help="Teacher of scd or ctm: trained is a diffusion model whose weights start the student, exact is the exact"
        " solution, none (ctm only) is no teacher. Default: trained.",
    )
    add(
        "--max_train_steps",
        type=int,
        default=3000,
        help="Number of steps of the method; a trained teacher takes as many before. ctm without a teacher takes twice"
        " as many itself. Default: 3000.",
    )
    add("--batch_size", type=int, default=512, help="Number of points per training step. Default: 512.")
    add("--learning_rate", type=float, default=2e-3, help="Peak learning rate. Default: 2e-3.")
    add("--seed", type=int, default=0, help="Seed of all random numbers. Default: 0.")
    add(
        "--output_dir",
        type=Path,
        default=Path("runs/toy"),
        help="Folder for report.json and toy.png. Default: runs/toy.",
    )
    settings = vars(parser.parse_args(argv))
    folder = settings.pop("output_dir")
    try:
        run = ToyRun(**settings)
        make_folder(folder)
    except ValueError as error:
        parser.error(str(error))
    result = run.run(folder)
    print(json.dumps(result, indent=2))
    print(f"Saved {folder / REPORT} and {folder / PICTURE}.")


if __name__ == "__main__":
    with ends_with_a_line(then="give the same command again"):
        main()
