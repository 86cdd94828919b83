"""Show that the loss does not measure quality: ECT on the quickstart's digits.

    python benchmarks/experiments/flat_loss.py --output_dir runs/flat_loss

The script trains like `make quickstart`, with more checkpoints, in about five minutes on two cores. It samples every
checkpoint, and writes the loss and the distance of the samples to the data as flat_loss.json and flat_loss.png. A
finished run is not repeated.
"""

import argparse
import json
from pathlib import Path

import torch

from cm_diffusers.engine.checkpoint import load_checkpoint
from cm_diffusers.engine.config import DataArguments, parse_config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.training.run import train
from cm_diffusers.evaluation.halves import HALVES, distances_to_half
from cm_diffusers.sampling import load_pipeline, sample_images


CONFIG = Path(__file__).parents[2] / "training" / "configs" / "digits_ect.yaml"
STEPS = (1, 2)
NAMES = {n: f"{n} step{'s' if n > 1 else ''}" for n in STEPS}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Distances for each checkpoint (by training step) and each number of network calls."""
    data = ImageData(DataArguments(dataset_name="digits"), class_conditional=True, show_progress=False)
    pipeline = load_pipeline(str(folder / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    found = {}
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        checkpoint = load_checkpoint(path)
        average = next(values for name, values in checkpoint.tensors.items() if name.startswith("ema"))
        pipeline.unet.load_state_dict(average)
        seeds, samples = range(len(data.images) // 2), {}
        for n, name in NAMES.items():
            made = sample_images(pipeline, seeds, num_inference_steps=n)
            samples[name] = torch.from_numpy(made).permute(0, 3, 1, 2)
        found[checkpoint.step] = distances_to_half(samples, data.images, data.labels)
        print(checkpoint.step, found[checkpoint.step])
    return found


def draw(log: list[dict], found: dict, pretraining: int, stage: int, file: Path) -> None:
    """Draw the loss above the distances, over the same training steps; grey marks pretraining, lines mark stages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    above.plot([row["step"] for row in log], [row["loss"] for row in log], "k")
    above.set(ylabel="loss", ylim=(0, None), title="Within a stage the loss is flat, and the samples get better")
    for name in NAMES.values():
        below.plot(list(found), [row[name] for row in found.values()], "o-", label=name)
    below.axhline(next(iter(found.values()))[HALVES], color="grey", ls=":", label="other real digits")
    below.set(xlabel="step", yscale="log", ylabel="Fréchet distance to real digits")
    below.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"], minor=False)
    below.yaxis.set_minor_formatter("")
    below.legend()
    for axis in (above, below):
        axis.axvspan(0, pretraining, color="0.92")
        for step in range(pretraining + stage, max(found), stage):
            axis.axvline(step, color="0.85", linewidth=0.8, zorder=0)
    above.text(pretraining / 2, 0, "pretraining", ha="center", va="bottom", color="0.4")
    above.text(pretraining + stage / 2, 0, "stage 0", ha="center", va="bottom", color="0.4")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/flat_loss"), help="folder of the run")
    folder = parser.parse_args().output_dir
    words = ["--config", str(CONFIG), "--output_dir", str(folder), "--validation_steps", "0"]
    words += ["--checkpointing_steps", "200", "--checkpoints_total_limit", "1000"]
    config = parse_config(words, ["ect"], "")
    train(config)
    torch.manual_seed(0)
    found = measure(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lengths = config.resolved().options
    draw(log, found, lengths.pretrain_steps, lengths.stage_steps, folder / "flat_loss.png")
    losses = {row["step"]: row["loss"] for row in log if row["step"] in found}
    rows = {step: {"loss": losses[step], **row} for step, row in found.items()}
    (folder / "flat_loss.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
