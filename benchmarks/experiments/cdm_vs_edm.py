"""Compare CDM with EDM at equal numbers of images and at equal time, on MNIST with small networks.

    OMP_NUM_THREADS=1 python benchmarks/experiments/cdm_vs_edm.py --output_dir runs/cdm_vs_edm

Each seed trains a diffusion model, from which three runs continue:

- edm and cdm: the same number of steps;
- edm_long: as much CPU time as cdm, by the measured CPU time per step.

The script prints a table of Fréchet distances to the test images, and writes results.json. The features come from a
small classifier trained on the test images; --judge replaces it. Finished runs are not repeated. Everything takes
about 45 minutes on one core. --pretrain_steps 0 trains from scratch.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.evaluation import frechet_distance, train_classifier
from cm_diffusers.sampling import load_pipeline, sample_images


TRAINING = Path(__file__).parents[2] / "training"


def cpu_seconds() -> float:
    """CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(folder: Path, method: str, steps: int, seed: int, *flags: object) -> float:
    """Train, and return the CPU seconds of the whole run with start-up and export; a finished run is not repeated."""
    note = folder / "cpu_seconds.json"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)  # the time of a partial run is unknown
        command = [sys.executable, TRAINING / "train_diffusion.py", "--output_dir", folder, *flags]
        command += ["--config", TRAINING / "configs" / f"mnist_{method}_small.yaml"]
        command += ["--max_train_steps", steps, "--seed", seed, "--validation_steps", 0]
        before = cpu_seconds()
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        note.write_text(json.dumps(cpu_seconds() - before))
    return json.loads(note.read_text())


def train_arms(args: argparse.Namespace, seed: int, overhead: float) -> dict[str, dict[str, float]]:
    """Steps, and CPU seconds without start-up and export, of each run of a seed."""
    root, rows, flags = args.output_dir / f"seed{seed}", {}, ["--dataset_name", args.dataset_name]

    def run(arm: str, method: str, steps: int) -> None:
        rows[arm] = {"steps": steps, "cpu_seconds": train(root / arm, method, steps, seed, *flags) - overhead}

    if args.pretrain_steps:
        run("start", "diffusion", args.pretrain_steps)
        flags += ["--pretrained_model_name_or_path", root / "start" / "pipeline", "--learning_rate", 5e-4]
        flags += ["--lr_warmup_steps", 20]
    run("edm", "diffusion", args.max_train_steps)
    seconds, steps = (sum(row[key] for row in rows.values()) for key in ("cpu_seconds", "steps"))
    run("cdm", "cdm", args.max_train_steps)
    run("edm_long", "diffusion", max(args.max_train_steps, round(rows["cdm"]["cpu_seconds"] / seconds * steps)))
    return rows


def make_judge(args: argparse.Namespace) -> Callable[[Path], float]:
    """A function from a file of samples, uint8 (N, H, W), to their Fréchet distance."""
    if args.judge is not None:
        words = shlex.split(args.judge)

        def ask(file: Path) -> float:
            command = [str(file) if word == "{samples}" else word for word in words]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["frechet"]

        return ask
    test = DataArguments(dataset_name=args.dataset_name, split="test", resolution=[16])
    data = ImageData(test, class_conditional=True)
    classifier = train_classifier(data.images.float() / 255, data.labels, epochs=5)
    real = classifier.features(data.images.float() / 255)
    return lambda file: frechet_distance(
        classifier.features(torch.from_numpy(np.load(file))[:, None].float() / 255), real
    )


def draw(pipeline: Path, count: int, steps: int) -> Path:
    """Sample a model by Heun's method, and return the file of the samples."""
    model = load_pipeline(str(pipeline))
    model.set_progress_bar_config(disable=True)
    images = sample_images(model, range(count), num_inference_steps=steps)
    file = pipeline.parent / "samples.npy"
    np.save(file, (images[..., 0] * 255).round().astype(np.uint8))
    return file


def show(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print means and standard deviations over seeds, and differences from cdm for each seed."""
    print("| run | steps | CPU seconds | Fréchet distance | minus cdm's, by seed | p |\n|---|---|---|---|---|---|")
    for arm in next(iter(results.values())):
        table = {key: np.array([row[arm][key] for row in results.values()]) for key in results[min(results)][arm]}
        distances = table["frechet"]
        less = distances - [row["cdm"]["frechet"] for row in results.values()]
        cells = [arm, *(f"{table[key].mean():.0f}" for key in ("steps", "cpu_seconds"))]
        cells += [f"{distances.mean():.2f} +- {distances.std(ddof=1):.2f}", ", ".join(f"{d:+.2f}" for d in less)]
        cells += [f"{stats.ttest_1samp(less, 0).pvalue:.3f}" if less.any() else ""]
        print(f"| {' | '.join(cells)} |")
    print("p: probability of such a difference by chance (t-test, paired by seed). Below 0.05 it exceeds the noise.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset_name", default="ylecun/mnist", help="MNIST, with splits train and test (default: ylecun/mnist)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more seeds (default: 0 1 2)")
    add("--pretrain_steps", type=int, default=600, help="steps of the diffusion model to start from (default: 600)")
    add("--max_train_steps", type=int, default=160, help="further steps of edm and of cdm (default: 160)")
    add("--num_samples", type=int, default=1000, help="samples of each model (default: 1000)")
    add("--num_inference_steps", type=int, default=9, help="N steps of Heun's method, 2 N - 1 calls (default: 9)")
    add("--judge", help="command that prints JSON with `frechet` for the .npy file {samples} (default: a classifier)")
    add("--output_dir", type=Path, required=True, help="folder of the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    overhead = train(args.output_dir / "one_step", "diffusion", 1, 0, "--dataset_name", args.dataset_name)
    judge, results = make_judge(args), {}
    for seed in args.seeds:
        results[str(seed)] = train_arms(args, seed, overhead)
        for arm, row in results[str(seed)].items():
            folder = args.output_dir / f"seed{seed}" / arm
            row["frechet"] = judge(draw(folder / "pipeline", args.num_samples, args.num_inference_steps))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    show(results)


if __name__ == "__main__":
    main()
