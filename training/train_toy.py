"""Train a method on a small problem, whose exact answer is known on the line, and draw what it learns.

    python training/train_toy.py --task bimodal --method scd --output_dir runs/toy
    python training/train_toy.py --task three_gmm --method ctm --output_dir runs/toy_ctm

Leaves toy.png and report.json: on the line `rms_error` (root mean square distance of the learned function from the
exact one over the noise marginal) and, for ctm, `wasserstein` by sampler (see cm_diffusers.toys.trajectories). Takes
a minute or two on one core.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
import json
from pathlib import Path

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.places import make_folder
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.toys import TASKS
from cm_diffusers.toys.runs import OPTIONS, PICTURE, REPORT, ToyRun


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("train_toy", __doc__)
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="bimodal", help="the data")
    add("--method", choices=list(OPTIONS), default="scd", help="what is trained")
    add(
        "--teacher",
        choices=["trained", "exact", "none"],
        help="scd's and ctm's: a diffusion model, from which the student starts (the default), the exact answer, or"
        " (ctm) none",
    )
    add(
        "--max_train_steps",
        type=int,
        default=3000,
        help="steps of the method, and before them as many of its teacher; ctm takes both itself without one (3000)",
    )
    add("--batch_size", type=int, default=512, help="points per step (512)")
    add("--learning_rate", type=float, default=2e-3, help="peak learning rate (2e-3)")
    add("--seed", type=int, default=0, help="every random number follows from it (0)")
    add("--output_dir", type=Path, default=Path("runs/toy"), help="leaves report.json and toy.png here")
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
