"""Measure a model, a folder of images, or a training run while it goes on, against a dataset.

    python training/evaluate.py --pretrained_model_name_or_path runs/mine/pipeline --dataset_name ylecun/mnist \\
        --resolution 16 --num_samples 10000 --num_inference_steps 1 2 4 --output_dir runs/mine
    torchrun --nproc_per_node 2 training/evaluate.py ...  the same by two processes, with the same result
    python training/evaluate.py --images_dir folder ... images instead of a model
    python training/evaluate.py --watch runs/mine ...   each checkpoint of a run, until it ends
    python training/evaluate.py --search_sigmas 2 ...   the best noise levels of two steps, and a copy with them

Leaves metrics.json and quality.png in the output folder. Where that is the folder of a run, the numbers go on the card
of its model. Image i is made from seed + i alone, so that the number of processes makes no difference.
"""

import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any

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
}


def table(report: dict[str, Any]) -> str:
    """The results for people to read."""
    names = [f"step {row['step']}, {row['name']}" if "step" in row else row["name"] for row in report["results"]]
    width = max(map(len, names)) + 2
    lines = [" " * width + "".join(f"{title:>11}" for title in COLUMNS.values())]
    for name, row in zip(names, report["results"]):
        lines.append(f"{name:{width}}" + "".join(f"{row[column]:11.4g}" for column in COLUMNS))
    extractor, count = report["extractor"]["name"], report["num_samples"]
    named = "FID-50k" if any("fid" in row for row in report["results"]) else "not FID-50k"
    lines.append(f"\n{count} samples against {report['reference']['images']} images; features: {extractor} ({named}).")
    spent = dict(report["time"])
    processes = spent.pop("processes")
    seconds = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in spent.items())
    return "\n".join([*lines, f"Seconds: {seconds} ({processes} process{'es' * (processes > 1)})."])


def next_command(args: EvaluationArguments, report: dict[str, Any]) -> str | None:
    """What to do with the results; nothing for images without their model."""
    run = args.folder if args.watch is None else Path(args.watch)
    model = run / "pipeline"
    if model.is_dir() and "search" not in report:
        return f"python training/push.py --model_dir {quote(str(model))}"
    if "search" in report:
        how = f"--num_inference_steps {args.search_sigmas}"
    elif args.pretrained_model_name_or_path:
        model, name = args.pretrained_model_name_or_path, best_name(report)
        steps = name.startswith("sigmas ")
        how = f"--sigmas {name[7:].replace(',', '')}" if steps else f"--num_inference_steps {name.split()[0]}"
        how += f" --revision {quote(args.revision)}" if args.revision else ""
    else:
        return None
    return f"python training/sample.py --pretrained_model_name_or_path {quote(str(model))} {how}"


def best_name(report: dict[str, Any]) -> str:
    """The name of the result whose images are nearest to the dataset."""
    return min(report["results"], key=lambda row: row["frechet_distance"])["name"]


def main(argv: list[str] | None = None) -> None:
    with ends_with_a_line(then="give the same command again"):
        argv = sys.argv[1:] if argv is None else argv
        args, data_args = parse_groups(argv, (EvaluationArguments, DataArguments), __doc__)
        report = evaluate(args, data_args)
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n" + table(report))
        print(f"Saved {args.folder / RunFiles.METRICS} and {args.folder / RunFiles.QUALITY}.")
        command = next_command(args, report)
        if command is not None:
            print(f"Try next:\n  {command}")


if __name__ == "__main__":
    main()
