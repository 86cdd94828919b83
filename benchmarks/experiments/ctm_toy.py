"""Train trajectory models on the toys, from a teacher and from scratch, with the same total number of steps.

    python benchmarks/experiments/ctm_toy.py --output_dir runs/ctm_toy

The script prints a table of Wasserstein-1 distances to the data by sampler: mean and standard deviation over seeds. It
writes ctm_toy.json and ctm_toy.png. The defaults mean 40 runs of one to two minutes on one core. Finished runs are
not repeated.
"""

import argparse
import json
import statistics
from pathlib import Path

from cm_diffusers import toys
from cm_diffusers.toys.runs import ToyRun
from cm_diffusers.toys.trajectories import SAMPLERS


TASKS = ("single_gaussian", "two_gmm", "uneven_two_gmm", "three_gmm")
TEACHERS = {"trained": "from a teacher", "none": "from scratch"}
TITLES = {name: title for name, (_, title) in SAMPLERS.items()} | {"data": "the data itself"}


def measure(args: argparse.Namespace) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Distances by task, teacher and sampler, with one number per seed; finished runs are not repeated."""
    found = {task: {teacher: {name: [] for name in TITLES} for teacher in TEACHERS} for task in args.tasks}
    for task in args.tasks:
        for teacher in TEACHERS:
            for seed in range(args.seeds):
                folder = args.output_dir / f"{task}_{teacher}_{seed}_{args.max_train_steps}"
                if not (folder / "report.json").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    ToyRun(task, "ctm", teacher, args.max_train_steps, seed=seed).run(folder)
                report = json.loads((folder / "report.json").read_text())
                for name, values in found[task][teacher].items():
                    values.append(report["wasserstein"][name])
    return found


def summary(values: list[float]) -> str:
    """Mean and standard deviation over seeds; for one seed only the number."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def table(found: dict) -> str:
    """A Markdown table with a row for each task and teacher, and a column for each sampler."""
    rows = [["task", "", *TITLES.values()], ["---"] * (2 + len(TITLES))]
    for task, by_teacher in found.items():
        for teacher, by_sampler in by_teacher.items():
            rows.append([task, TEACHERS[teacher], *map(summary, by_sampler.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(found: dict, file: Path) -> None:
    """Draw a panel for each task: a point for each run and sampler, and a line for the data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (task, by_teacher) in zip(axes, found.items()):
        for shift, colour, (teacher, by_sampler) in zip((-0.15, 0.15), ("C0", "C1"), by_teacher.items()):
            for place, name in enumerate(SAMPLERS):
                values, label = by_sampler[name], TEACHERS[teacher] if place == 0 else None
                axis.scatter([place + shift] * len(values), values, s=16, color=colour, alpha=0.6, label=label)
        floor = statistics.mean(by_teacher["trained"]["data"])
        axis.axhline(floor, color="k", linewidth=0.8, linestyle=":", label="the data itself")
        axis.set(title=task, yscale="log", xlim=(-0.5, len(SAMPLERS) - 0.5))
        names = [TITLES[name].replace(", ", ",\n") for name in SAMPLERS]
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes[0].set_ylabel("Wasserstein-1 distance to the data")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(toys.TASKS), default=list(TASKS), help=f"default: {' '.join(TASKS)}")
    add("--seeds", type=int, default=5, help="runs of each kind (default: 5)")
    add("--max_train_steps", type=int, default=3000, help="half the steps of a run (default: 3000)")
    add("--output_dir", type=Path, default=Path("runs/ctm_toy"), help="folder; finished runs in it are not repeated")
    args = parser.parse_args()
    found = measure(args)
    print(table(found))
    draw(found, args.output_dir / "ctm_toy.png")
    (args.output_dir / "ctm_toy.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
