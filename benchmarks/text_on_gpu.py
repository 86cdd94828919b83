"""Time and memory of a LoRA training step of SDXL at 1024 x 1024, by the precision of the frozen weights.

    python benchmarks/text_on_gpu.py --output text_on_gpu.json
    python benchmarks/text_on_gpu.py --device cpu --tiny --output text_on_cpu.json    # the same on a tiny U-Net

The U-Net has SDXL's size and random weights, so nothing is downloaded. The method is `lcm` with a fixed guidance
scale: teacher and student share the frozen weights, and the student has an adapter of rank 64. A step is the loss,
the backward pass, AdamW, the target network and one average of the adapter's weights.

Latents of 128 x 128 and embeddings of the prompts are random: text and image encoders are not part of a step. The
precision is bf16. Memory is that of torch's allocator on the GPU: `weights` before the first step, `peak` within the
steps. On a CPU it is not measured.
"""

import argparse
import gc
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import seconds
from diffusers import UNet2DConditionModel

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import Guided
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.frozen import copied
from cm_diffusers.engine.config import RunArguments
from cm_diffusers.engine.saved.base_precision import set_base_precision
from cm_diffusers.engine.saved.lora import add_lora
from cm_diffusers.engine.training.state import RunState
from cm_diffusers.models.text_unet import with_conditions
from cm_diffusers.objectives import LCM, Batch, ModelSpec


SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816
}  # fmt: skip
TINY = SDXL | {
    "sample_size": 8, "block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2), "cross_attention_dim": 32,
    "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64
}  # fmt: skip
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SPEC = ModelSpec(1.0, "timestep", 14.6, "epsilon", noise_schedule=SCHEDULE)
BASES = ("bf16", "int8", "nf4")
BATCHES = (1, 2, 3, 4)
TOKENS = 77
RANK = 64
GUIDANCE = 7.5


@dataclass(frozen=True)
class Run:
    """A run with one precision of the frozen weights."""

    state: RunState
    accelerator: Accelerator
    config: dict[str, Any]

    def step(self, batch: int) -> None:
        """Take a training step on `batch` samples."""
        objective, optimizer, device = self.state.objective, self.state.optimizer, self.accelerator.device
        draws = Draws(0, self.state.step, range(batch), device)
        size = self.config["sample_size"]
        loss = objective.loss(Batch(draws.normal("latents", (4, size, size)), condition(self.config, draws)), draws)
        self.accelerator.backward(loss.total)
        optimizer.step()
        optimizer.zero_grad()
        self.state.step += 1
        objective.after_step(self.state.step - 1)
        self.state.ema.update(self.state.step * batch, batch)


def condition(config: dict[str, Any], draws: Draws) -> Condition:
    """Random embeddings of prompts, and the sizes of uncropped pictures."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    side = 8.0 * config["sample_size"]
    sizes = torch.tensor([side, side, 0, 0, side, side], device=draws.device).expand(len(draws.rows), 6)
    text = draws.normal("text", (TOKENS, config["cross_attention_dim"]))
    return Condition({"text": text, "pooled": draws.normal("pooled", (pooled,)), "sizes": sizes})


def build(base: str, config: dict[str, Any], accelerator: Accelerator) -> Run:
    """A teacher with random weights in the precision `base`, and its student, ready to train."""
    device = accelerator.device
    with device:
        teacher = with_conditions(UNet2DConditionModel(**config))
    set_base_precision(teacher.eval(), base, accelerator.mixed_precision, device)
    student = add_lora(copied(teacher), RANK)
    nulls = {name: torch.zeros_like(value[0]) for name, value in condition(config, Draws(0, 0, [0])).entries.items()}
    guided = Guided(SPEC.denoiser(teacher), GUIDANCE, {name: nulls[name] for name in ("text", "pooled")})
    objective = LCM(student, SPEC, LCM.Options(), 1000, teacher=guided)
    return Run(RunState(objective, RunArguments(ema_decay=[0.999]), accelerator), accelerator, config)


def measure(run: Run, batch: int, checkpointing: bool, steps: int) -> dict[str, float | str | None]:
    """Seconds of a step and the peak memory in GB, or "out of memory"."""
    network, device = run.state.objective.network, run.accelerator.device
    network.enable_gradient_checkpointing() if checkpointing else network.disable_gradient_checkpointing()
    try:
        run.step(batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        time = seconds(lambda: run.step(batch), steps)
    except torch.cuda.OutOfMemoryError:
        run.state.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return {"seconds": "out of memory", "peak_gb": None}
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None
    return {"seconds": round(time, 4), "peak_gb": peak}


def measure_base(base: str, config: dict[str, Any], accelerator: Accelerator, steps: int) -> list[dict[str, Any]]:
    """A row for each batch size, with and without gradient checkpointing; one row with the reason if there is none."""
    try:
        run = build(base, config, accelerator)
    except ValueError as error:  # a package is missing
        print(f"{base:>13} {error}")
        return [{"base": base, "skipped": str(error)}]
    gc.collect()
    weights = round(torch.cuda.memory_allocated() / 1e9, 2) if accelerator.device.type == "cuda" else None
    rows = []
    for checkpointing in (False, True):
        for batch in BATCHES:
            row = {"base": base, "weights_gb": weights, "batch": batch, "checkpointing": checkpointing}
            rows.append(row | measure(run, batch, checkpointing, steps))
            print(" ".join(f"{value!s:>13}" for value in rows[-1].values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny U-Net in place of SDXL's")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES, help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps (default: 5)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16")
    if accelerator.device.type != args.device:
        parser.error("this machine has no GPU. Give --device cpu --tiny.")
    config = TINY if args.tiny else SDXL
    columns = ("base", "weights GB", "batch", "checkpointing", "seconds", "peak GB")
    print(" ".join(f"{column:>13}" for column in columns))
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": name, "python": platform.python_version(), "torch": torch.__version__}
    report = {"machine": machine, "rank": RANK, "tiny": args.tiny, "rows": []}
    for base in args.bases:
        report["rows"] += measure_base(base, config, accelerator, args.steps)
        args.output.write_text(json.dumps(report, indent=2))
        accelerator.free_memory()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
