"""Measure the quality of a model, a folder of images, or a running training against a dataset.

For users who compare models or choose checkpoints, sampling steps, noise levels or guidance. The measures are Fréchet
and kernel distance, precision, recall, density and coverage; with labels also the share of samples of the right class.

    python training/evaluate.py --pretrained_model_name_or_path runs/mine/pipeline --dataset_name ylecun/mnist \\
        --resolution 16 --num_samples 10000 --num_inference_steps 1 2 4 --output_dir runs/mine

Other uses, with the same options for the dataset:

    python training/evaluate.py --images_dir folder ... evaluate images instead of a model
    python training/evaluate.py --watch runs/mine ...   evaluate each checkpoint of a run until it ends
    python training/evaluate.py --search_sigmas 2 ...   find the best noise levels for two steps, and save a copy
    python training/evaluate.py --search_guidance 2 ... find the best guidance scale for two steps
    cm-diffusers evaluate --num_processes 2 ...         evaluate on two processes, with the same result

Writes metrics.json and quality.png to the output folder. If that is the folder of a run, the numbers also go on its
model card. Image i depends only on seed + i and its class label, so the number of processes does not matter.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
import math
import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any

from cm_diffusers.engine.commands import command, in_these_words
from cm_diffusers.engine.config import DataArguments, parse_groups
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.evaluation.evaluate import evaluate
from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.processes import ends_with_a_line


COLUMNS = {
    "frechet_distance": "Fréchet",
    "kernel_distance": "kernel",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "label_agreement": "labels",
}


def table(report: dict[str, Any]) -> str:
    """Format the results of a report as text with one line for each way of sampling."""
    names = [f"step {row['step']}, {row['name']}" if "step" in row else row["name"] for row in report["results"]]
    width = max(map(len, names)) + 2
    columns = [column for column in COLUMNS if any(column in row for row in report["results"])]
    lines = [" " * width + "".join(f"{COLUMNS[column]:>11}" for column in columns)]
    for name, row in zip(names, report["results"]):
        lines.append(f"{name:{width}}" + "".join(f"{row.get(column, math.nan):11.4g}" for column in columns))
    extractor, count = report["extractor"]["name"], report["num_samples"]
    named = "FID-50k" if any("fid" in row for row in report["results"]) else "not FID-50k"
    lines.append(f"\n{count} samples against {report['reference']['images']} images. Features: {extractor} ({named}).")
    if "label_agreement" in columns:
        real = report["reference"]["label_agreement"]
        lines.append(
            f"Labels: share of samples whose nearest real images show their class; {real:.4g} for the real images."
        )
    spent = dict(report["time"])
    processes = spent.pop("processes")
    seconds = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in spent.items())
    lines.append(f"Seconds: {seconds} ({processes} process{'es' * (processes > 1)}).")
    return "\n".join([*lines, *guidance_warnings(report["results"])])


def guidance_warnings(results: list[dict[str, Any]]) -> list[str]:
    """Return a warning for each guidance scale that lowers the Fréchet distance and also precision or label agreement.

    Such images are not better: with few steps the distance alone misjudges guidance (arXiv:2603.14186).

    Args:
        results: the rows of a report.
    """
    plain = {(row.get("step"), row["name"]): row for row in results if "guidance_scale" not in row.get("how", {})}
    warnings = []
    for row in results:
        name = row["name"].partition(", guidance ")[0]
        base = plain.get((row.get("step"), name))
        if base is None or base is row:
            continue
        if row["frechet_distance"] >= base["frechet_distance"]:
            continue
        fallen = [
            f"the {name.replace('_', ' ')} ({base[name]:.3g} to {row[name]:.3g})"
            for name in ("precision", "label_agreement")
            if name in row and name in base and row[name] < base[name]
        ]
        if fallen:
            warnings.append(
                f"WARNING: {row['name']}: the Fréchet distance falls ({base['frechet_distance']:.4g} to"
                f" {row['frechet_distance']:.4g}), and so does {' and '.join(fallen)}. Look at the images before you"
                " choose this guidance."
            )
    return warnings


def next_command(args: EvaluationArguments, report: dict[str, Any]) -> str | None:
    """Return the command for the next step: push the model, or sample with the best result. None for mere images."""
    run = args.folder if args.watch is None else Path(args.watch)
    model = run / RunFiles.MODEL
    best_model = args.folder / RunFiles.BEST / RunFiles.MODEL
    if args.keep_best and best_model.is_dir():
        return f"{command('push')} --model_dir {quote(str(best_model))}"
    if model.is_dir() and not report.keys() & {"search", "guidance_search"}:
        return f"{command('push')} --model_dir {quote(str(model))}"
    if "search" in report:
        how = f"--num_inference_steps {args.search_sigmas}"
        if args.guidance_scale and args.guidance_scale[0] != 1:
            how += f" --guidance_scale {args.guidance_scale[0]:g}"
    elif args.pretrained_model_name_or_path:
        model, best = args.pretrained_model_name_or_path, best_result(report)
        levels = (
            f"--sigmas {' '.join(f'{sigma:g}' if isinstance(sigma, float) else sigma for sigma in best['sigmas'])}"
        )
        how = levels if best["name"].startswith("sigmas ") else f"--num_inference_steps {best['name'].split()[0]}"
        for name, value in best.get("how", {}).items():
            how += f" --{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        how += f" --revision {quote(args.revision)}" if args.revision else ""
    else:
        return None
    return f"{command('sample')} --pretrained_model_name_or_path {quote(str(model))} {how}"


def best_result(report: dict[str, Any]) -> dict[str, Any]:
    """Return the result with the lowest Fréchet distance."""
    return min(report["results"], key=lambda row: row["frechet_distance"])


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    with ends_with_a_line(then="give the same command again"):
        argv = sys.argv[1:] if argv is None else argv
        args, data_args = parse_groups(argv, (EvaluationArguments, DataArguments), "evaluate", in_these_words(__doc__))
        report = evaluate(args, data_args)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n" + table(report))
        print(f"Saved {args.folder / RunFiles.METRICS} and {args.folder / RunFiles.QUALITY}.")
        following = next_command(args, report)
        if following is not None:
            print(f"Try next:\n  {following}")


if __name__ == "__main__":
    main()
