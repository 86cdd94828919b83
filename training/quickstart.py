"""Train, reload, sample and evaluate a small consistency model in a few minutes on a CPU.

For newcomers who want to see the library work, without a GPU or a download:

    python training/quickstart.py

Trains a class-conditional ECT model on the 8x8 handwritten digits of scikit-learn, samples it in a process that
imports only diffusers, and measures the samples. Writes to runs/quickstart:

    pipeline/     the model
    samples.png   samples beside real images
    metrics.json  Fréchet distances and durations

The same command resumes a stopped run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.pictures.curves import titled_row
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.engine.sharing.card import renew_card
from cm_diffusers.evaluation.halves import HALVES, distances_to_half
from cm_diffusers.objectives.options import steps_of
from cm_diffusers.sampling import image_grid


ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "training" / "configs" / "digits_ect.yaml"
FOLDER = ROOT / "runs" / "quickstart"
STEPS = (1, 2, 4)

# samples with diffusers alone, as users without this library do
SAMPLER = """
import sys
import numpy, torch
from diffusers import DiffusionPipeline

folder, out, count, *steps = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
for n in map(int, steps):
    generator = torch.Generator().manual_seed(0)
    labels = [i % 10 for i in range(int(count))]
    images = pipe(int(count), labels, num_inference_steps=n, generator=generator, output_type="np").images
    numpy.save(f"{out}/{n}.npy", images)
assert "cm_diffusers" not in sys.modules
"""


def step_name(n: int) -> str:
    """The name of a result with `n` sampling steps."""
    return f"{n} step{'s' if n > 1 else ''}"


def train() -> None:
    """Train the model in a separate process. A failed training ends this program with the same code."""
    command = [sys.executable, str(ROOT / "training" / "train_consistency.py"), "--config", str(CONFIG)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    run = subprocess.Popen([*command, "--output_dir", str(FOLDER)], env=environment)
    try:
        code = run.wait()
    except KeyboardInterrupt:  # the run receives the signal as well and saves
        code = run.wait()
    if code:  # its message is printed already
        raise SystemExit(code)


def sample(count: int) -> dict[int, np.ndarray]:
    """Sample images (count, 8, 8, 1) in [0, 1] for each number of steps, in a process that imports only diffusers."""
    with tempfile.TemporaryDirectory() as out:
        arguments = [str(FOLDER / RunFiles.MODEL), out, str(count), *map(str, STEPS)]
        subprocess.run([sys.executable, "-I", "-c", SAMPLER, *arguments], check=True)
        return {n: np.load(f"{out}/{n}.npy") for n in STEPS}


def draw(samples: dict[int, np.ndarray], data: ImageData) -> None:
    """Draw samples beside real images, with one class per column.

    Args:
        samples: images (n, 8, 8, 1) in [0, 1] by number of steps, with labels 0 to 9 in turn.
        data: the real images.
    """
    rows = [data.images[data.labels == label][:8] for label in range(10)]
    real = torch.stack(rows, 1).flatten(0, 1).permute(0, 2, 3, 1).numpy() / 255
    grids = {step_name(n): samples[n][:80] for n in STEPS} | {"real images": real}
    captions = [str(i % 10) for i in range(80)]
    titled_row([(name, image_grid(grid, 10, 32, captions)) for name, grid in grids.items()]).save(
        FOLDER / "samples.png"
    )


def main() -> None:
    """Run the script. It has no options besides --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # for --help, and to refuse options
    with ends_with_a_line(then="give the same command again"):
        quickstart()


def quickstart() -> None:
    """Train, sample and evaluate the model, and print the results."""
    data = ImageData(DataArguments(dataset_name="digits"), class_conditional=True, show_progress=False)
    clock = [time.perf_counter()]
    train()
    clock.append(time.perf_counter())
    samples = sample(len(data.images) // 2)
    clock.append(time.perf_counter())
    made = {step_name(n): torch.from_numpy(images).permute(0, 3, 1, 2) for n, images in samples.items()}
    distances = distances_to_half(made, data.images, data.labels)
    draw(samples, data)
    clock.append(time.perf_counter())

    config = yaml.safe_load(CONFIG.read_text())
    steps = config["max_train_steps"]
    names = ("training_seconds", "sampling_seconds", "judging_seconds")
    report = {
        "dataset": "digits (scikit-learn), 8x8",
        "results": [
            {"name": step_name(n), "num_inference_steps": n, "frechet_distance": distances[step_name(n)]}
            for n in STEPS
        ],
        "real_images": {"num_samples": len(data.images) // 2, "frechet_distance": distances[HALVES]},
        "extractor": {"name": "a small classifier, trained on the same images"},
        "num_samples": len(data.images) // 2,
        "steps": {"training": steps, "pretraining": steps_of(config["pretrain_steps"], steps)},
        "seed": 0,
        "time": {name: round(b - a, 1) for name, a, b in zip(names, clock, clock[1:])},
    }
    (FOLDER / RunFiles.METRICS).write_text(json.dumps(report, indent=2) + "\n")
    renew_card(FOLDER / RunFiles.MODEL, FOLDER.name)

    print("\nFréchet distance to real digits, in the features of a small classifier (lower is better):")
    for name, distance in distances.items():
        print(f"  {name:28} {distance:8.3f}")
    folder = FOLDER.relative_to(ROOT)
    print(f"\nLook at {folder}/samples.png; the model is {folder}/pipeline. Try next:")
    print(f"  .venv/bin/python training/sample.py --pretrained_model_name_or_path {folder}/pipeline --class_labels 3")
    print(f"  .venv/bin/python training/sample.py --pretrained_model_name_or_path {folder}/pipeline --sigmas 80 1 0.2")
    print("  .venv/bin/python training/train_consistency.py --train_data_dir my_images --resolution 32")


if __name__ == "__main__":
    main()
