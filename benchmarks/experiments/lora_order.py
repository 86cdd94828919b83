"""First the task LoRA, then the distillation, or the other way round? In the world of shapes, after `make shapes`.

    python benchmarks/experiments/lora_order.py [--shapes runs/shapes] [--seeds 3] [--steps 300]

The task is a new palette: red and blue change places, green and yellow too. A LoRA learns it from pictures by the
diffusion loss. Then, for each seed:

- "task first": the teacher with this LoRA (`--teacher_lora`) is distilled into a second LoRA, on pictures of the task.
  Both LoRAs are loaded.
- "task first, old pictures": the same on pictures of the old palette, which the teacher with the task does not make.
- "distilled first": the LoRA of the teacher without the task is loaded beside the task LoRA, which never met it.

The judge counts pictures of held-out prompts that are right in the new palette, by number of steps. Results go to
`lora_order.json` beside the report of `make shapes`.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline

from cm_diffusers.engine.saved.lora import add_lora, save_lora
from cm_diffusers.toys import shapes, shapes_teacher


SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train_text_to_image.py"
PALETTE = {"red": "blue", "blue": "red", "green": "yellow", "yellow": "green"}
STEPS = (1, 2, 4)
TEACHER_STEPS = 25
TASK_STEPS = 300
ORDERS = ("task first", "task first, old pictures", "distilled first")
BATCH = 64


def repainted(prompt: str) -> str:
    """The prompt whose picture the task wants for `prompt`."""
    return re.sub("|".join(PALETTE), lambda found: PALETTE[found[0]], prompt)


def train_task(teacher: Path, folder: Path, seed: int) -> None:
    """Train the LoRA of the task on pictures with repainted shapes, and save it."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    prompts = shapes_teacher.drawn_prompts(4000, seed)
    latents = shapes_teacher.encoded(pipeline.vae, [repainted(prompt) for prompt in prompts], seed)
    with torch.no_grad():
        text, rows = shapes_teacher.embedded(pipeline, prompts)
    unet = add_lora(pipeline.unet, rank=16).train()
    optimiser = shapes_teacher.Optimiser(unet, 1e-3, TASK_STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(TASK_STEPS):
        some = torch.randint(len(latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < shapes_teacher.NO_PROMPT
        embeddings = text[torch.where(dropped, 0, rows[some])]
        optimiser.step(shapes_teacher.v_loss(unet, pipeline.scheduler, latents[some], embeddings, generator))
    save_lora(pipeline, folder)


def distil(teacher: Path, pictures: Path, folder: Path, seed: int, steps: int, task: Path | None) -> None:
    """Distil the teacher, with the LoRA of the task if it is given."""
    words = ["--pretrained_teacher_model", teacher, "--dataset_name", pictures, "--output_dir", folder, "--seed", seed]
    words += ["--lora_rank", 32, "--train_batch_size", BATCH, "--learning_rate", 1e-3, "--max_train_steps", steps]
    words += ["--teacher_guidance_scale", shapes_teacher.GUIDANCE_SCALE, "--ema_half_life", 5, "--validation_steps", 0]
    words += [] if task is None else ["--teacher_lora", task]
    subprocess.run([sys.executable, SCRIPT, *map(str, words)], check=True)


def shares(teacher: Path, task: Path, student: Path, prompts: list[str], seed: int) -> dict[str, float]:
    """The shares of right pictures by number of steps, with the LoRAs of the task and of the student."""
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.load_lora_weights(task, adapter_name="task")
    pipeline.load_lora_weights(student, adapter_name="student")
    pipeline.set_adapters(["task", "student"])
    pipeline.scheduler = LCMScheduler.from_pretrained(student, subfolder="scheduler")
    return {str(n): judged(pipeline, prompts, n, 1.0, seed) for n in STEPS}


def judged(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, scale: float, seed: int) -> float:
    pictures = shapes_teacher.sampled(pipeline, prompts, seed, steps, scale)
    return shapes.share_right(pictures, [repainted(prompt) for prompt in prompts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    teacher, pictures = args.shapes / "teacher", args.shapes / "pictures.parquet"
    prompts, rows = shapes_teacher.held_out_prompts(200), []
    repainted_pictures = args.shapes / "repainted.parquet"
    if not repainted_pictures.exists():
        shapes_teacher.write_pictures(repainted_pictures, shapes_teacher.FULL.pictures, repainted)
    for seed in range(args.seeds):
        home = args.shapes / "order" / str(seed)
        train_task(teacher, home / "task", seed)
        pipeline = StableDiffusionPipeline.from_pretrained(teacher)
        pipeline.load_lora_weights(home / "task")
        scale = shapes_teacher.GUIDANCE_SCALE
        row = {"seed": seed, "teacher with task": judged(pipeline, prompts, TEACHER_STEPS, scale, seed)}
        settings = (home / "task", repainted_pictures), (home / "task", pictures), (None, pictures)
        for order, (task, data) in zip(ORDERS, settings):
            folder = home / order.replace(", ", "_").replace(" ", "_")
            distil(teacher, data, folder, seed, args.steps, task)
            row[order] = shares(teacher, home / "task", folder / "pipeline", prompts, seed)
        rows.append(row)
        print(json.dumps(row), flush=True)
        (args.shapes / "lora_order.json").write_text(json.dumps(rows, indent=1))
    for order in ORDERS:
        found = {n: np.array([row[order][str(n)] for row in rows]) for n in STEPS}
        print(order, {n: f"{values.mean():.3f} +- {values.std():.3f}" for n, values in found.items()})


if __name__ == "__main__":
    main()
