"""Make the pictures of docs/troubleshooting.md: what common mistakes look like, and the same after mending them.

    OMP_NUM_THREADS=1 python benchmarks/experiments/troubles.py --output_dir runs/troubles

All runs use the 8 x 8 digits. Together they take about 15 minutes on one core. Finished runs are not repeated.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cm_diffusers.engine.pictures.curves import plot_losses, titled_row
from cm_diffusers.sampling import image_grid, load_pipeline, sample_images


ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs/images"
COMMON = ["--config", "digits_ect", "--validation_steps", "0"]
RUNS = {
    "good": ["train", *COMMON],
    "pretraining": ["train", *COMMON, "--max_train_steps", "1600", "--pretrain_steps", "1599"],
    "diverged": ["train", *COMMON, "--max_train_steps", "600", "--learning_rate", "0.03", "--logging_steps", "5"],
}
STUDENT = ["--method", "ect", "--dataset_name", "digits", "--class_conditional", "--max_train_steps", "800"]
STUDENT += ["--train_batch_size", "64", "--lr_scheduler", "cosine", "--validation_steps", "0"]
STUDENTS = {
    "epsilon": ["--weighting", "edm", "--learning_rate", "2e-4"],
    "epsilon_mended": ["--learning_rate", "1e-3"],
}


def command(*words: str) -> int:
    """Run a command of the library, and return its exit code."""
    return subprocess.run([sys.executable, "-m", "cm_diffusers.cli", *words], check=False).returncode


def grid(model: Path, **call: object) -> Image.Image:
    """Forty samples of a model."""
    pipeline = load_pipeline(str(model))
    pipeline.set_progress_bar_config(disable=True)
    return image_grid(sample_images(pipeline, range(40), **call), columns=10, min_side=32)


def row(name: str, panels: Sequence[tuple[str, Image.Image]]) -> None:
    """Write titled pictures side by side."""
    titled_row(panels).save(PICTURES / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/troubles"), help="folder of the runs")
    folder = parser.parse_args().output_dir
    for name, words in RUNS.items():
        if not (folder / name / "pipeline").is_dir() and not (folder / name / "diverged.json").is_file():
            command(*words, "--output_dir", str(folder / name))
    teacher = folder / "teacher"
    if not teacher.is_dir():
        script = [sys.executable, str(Path(__file__).with_name("stock_teacher.py")), "--kind", "epsilon"]
        data = ["--dataset_name", "digits", "--resolution", "8", "--max_train_steps", "1000"]
        subprocess.run([*script, *data, "--output_dir", str(teacher)], check=True)
    for name, words in STUDENTS.items():
        if not (folder / name / "pipeline").is_dir():
            start = ["--pretrained_model_name_or_path", str(teacher)]
            command("train", *STUDENT, *start, *words, "--output_dir", str(folder / name))
    good = folder / "good/pipeline"
    row(
        "trouble_one_step",
        [
            ("still pretraining: 1 call", grid(folder / "pretraining/pipeline", sigmas=[80])),
            ("2 calls", grid(folder / "pretraining/pipeline", sigmas=[80, 0.8])),
            ("after tuning: 1 call", grid(good, sigmas=[80])),
        ],
    )
    row(
        "trouble_levels",
        [
            ("sigmas [0.4]: too low a start", grid(good, sigmas=[0.4])),
            ("sigmas [80, 40]: the second call changes little", grid(good, sigmas=[80, 40])),
            ("sigmas [80, 0.8]", grid(good, sigmas=[80, 0.8])),
        ],
    )
    wrong, mended = (folder / name / "pipeline" for name in STUDENTS)
    row(
        "trouble_epsilon",
        [
            ("weighting edm: 1 call", grid(wrong, num_inference_steps=1)),
            ("inverse_gap: 1 call", grid(mended, num_inference_steps=1)),
            ("inverse_gap: sigmas [30, 3]", grid(mended, sigmas=[30, 3])),
        ],
    )
    plot_losses(folder / "diverged/log.jsonl", PICTURES / "trouble_diverged.png")


if __name__ == "__main__":
    main()
