"""Text to image in few steps, in a world small enough to judge: `make shapes`, or `make shapes QUICK=1`.

    python benchmarks/shapes.py [--quick] [--output_dir runs/shapes]

1. A Stable Diffusion pipeline of coloured shapes is trained: autoencoder, text encoder and U-Net.
2. LoRA students of it are distilled by `train_text_to_image.py`.
3. A judge looks at pictures of prompts that no training has shown. It checks shapes, colours, counts and places.

It leaves `report.json`, with the share of right pictures by number of steps, and `shapes.png`. A run that was stopped
goes on where it was.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from cm_diffusers.engine.pictures.prompts import save_prompt_grid
from cm_diffusers.toys import shapes_teacher


SCRIPT = Path(__file__).resolve().parent.parent / "training" / "train_text_to_image.py"
STEPS = (1, 2, 4, 8)
TEACHER_STEPS = 25
SHOWN = 6
STUDENTS = ("lcm", "tcd", "ecd")
STUDENT_STEPS = 300
FLAGS = "--lora_rank 32 --train_batch_size 64 --learning_rate 1e-3 --ema_half_life 5 --logging_steps 50".split()


def distil(method: str, folder: Path, teacher: Path, pictures: Path, steps: int) -> None:
    """Train the student of `method` in `folder` for `steps` steps."""
    words = ["--method", method, "--pretrained_teacher_model", teacher, "--dataset_name", pictures, *FLAGS]
    words += ["--teacher_guidance_scale", shapes_teacher.GUIDANCE_SCALE, "--max_train_steps", steps]
    words += ["--validation_steps", 0, "--output_dir", folder]
    subprocess.run([sys.executable, SCRIPT, *map(str, words)], check=True)


def student_of(teacher: Path, folder: Path) -> DiffusionPipeline:
    """The pipeline of a student, loaded as its card says."""
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.load_lora_weights(folder)
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipeline.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--quick", action="store_true", help="Train everything briefly, in under four minutes.")
    args = parser.parse_args()
    begin, folder, teacher = time.time(), args.output_dir, args.output_dir / "teacher"
    size = shapes_teacher.QUICK if args.quick else shapes_teacher.FULL
    if not (teacher / "trained").exists():
        shapes_teacher.make_teacher(teacher, size=size)
        (teacher / "trained").touch()
    pictures = folder / "pictures.parquet"
    if not pictures.exists():
        shapes_teacher.write_pictures(pictures, size.pictures)

    prompts = shapes_teacher.held_out_prompts(50 if args.quick else 400)
    pipeline, scale = DiffusionPipeline.from_pretrained(teacher), shapes_teacher.GUIDANCE_SCALE
    judged = shapes_teacher.judge_prompts
    report = {"teacher": judged(pipeline, prompts, num_inference_steps=TEACHER_STEPS, guidance_scale=scale)}
    report["teacher_own"] = {
        str(n): judged(pipeline, prompts, num_inference_steps=n, guidance_scale=scale) for n in STEPS
    }
    columns = [(f"teacher, {TEACHER_STEPS} steps", shown(pipeline, prompts, TEACHER_STEPS, scale))]
    for method in STUDENTS:
        distil(method, folder / method, teacher, pictures, 20 if args.quick else STUDENT_STEPS)
        pipeline = student_of(teacher, folder / method / "pipeline")
        report[method] = {str(n): judged(pipeline, prompts, num_inference_steps=n, guidance_scale=1.0) for n in STEPS}
        columns += [(f"{method}, {n} step{'s' * (n > 1)}", shown(pipeline, prompts, n, 1.0)) for n in (1, 2, 4)]
    save_prompt_grid(folder / "shapes.png", prompts[:SHOWN], columns)
    report["seconds"] = round(time.time() - begin)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1) + f"\nThe picture is {folder / 'shapes.png'}.")


def shown(pipeline: DiffusionPipeline, prompts: list[str], steps: int, scale: float) -> np.ndarray:
    """Pictures (SHOWN, H, W, 3) in [0, 1] of the first prompts."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(SHOWN)]
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
    return pipeline(prompts[:SHOWN], generator=generators, **arguments).images


if __name__ == "__main__":
    main()
