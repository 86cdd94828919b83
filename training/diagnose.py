"""Draw what a saved model makes of noise: one image denoised from 16 levels; with a teacher, one-step guesses beside
the ends of its ODE; tangents beside differences of neighbours.

    python training/diagnose.py --pretrained_model_name_or_path runs/mnist_scd_small/pipeline \\
        --pretrained_teacher_model runs/mnist_trigflow_small/pipeline --dataset_name ylecun/mnist
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
import argparse
import json
from pathlib import Path

import torch

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import Guided
from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.config import DataArguments, ModelArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.files import replace_file
from cm_diffusers.engine.pictures.diagnostics import save_diagnostics
from cm_diffusers.engine.places import check_place, find_device, make_folder
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.engine.saved.start import check_fit, denoiser_of, load_pipeline, load_teacher
from cm_diffusers.engine.saved.stock import nulls_of
from cm_diffusers.pipelines.class_names import null_class


def diagnose(args: argparse.Namespace) -> dict[str, float]:
    """Leaves diagnostics.png and diagnostics.json in the output folder. Raises ValueError for what can't be done."""
    check_place(args.output_dir)
    device = find_device(args.device)
    pipeline = load_pipeline(args.pretrained_model_name_or_path).to(device)
    if pipeline.vae is not None:
        raise ValueError("this model makes latents, which have no picture of their own.")
    channels, height, width = pipeline.sample_shape
    shape = {"resolution": [height, width], "channels": channels if channels in (1, 3) else None}
    settings = DataArguments(dataset_name=args.dataset_name, split=args.split, **shape)
    make_folder(args.output_dir)
    data = ImageData(settings, pipeline.num_classes is not None)
    teacher = None
    if args.pretrained_teacher_model:
        saved = load_teacher(args.pretrained_teacher_model, ModelArguments())
        check_fit(saved, data, "teacher")
        saved.network.to(device)
        teacher = saved.denoiser
    batch = next(data.batches(ProcessShare(8, 1, 0, 1), args.seed))
    images = batch["images"].to(device).float() / 127.5 - 1
    condition = Condition(batch["condition"]).to(device)
    pipeline.unet.eval()
    denoiser = denoiser_of(pipeline)
    if args.guidance_scale != 1:
        null = null_class(pipeline.unet)
        if null is None:
            raise ValueError("guidance_scale needs a model that knows a class for none (--label_dropout trains one).")
        denoiser = Guided(denoiser, args.guidance_scale, nulls_of(null))
    numbers = save_diagnostics(
        denoiser,
        images,
        condition,
        args.output_dir / "diagnostics.png",
        teacher=teacher,
        sigma_max=pipeline.scheduler.config.get("sigma_max", 80.0),
        network=pipeline.unet if args.guidance_scale == 1 else None,  # tangents are the network's own
    )
    replace_file(args.output_dir / "diagnostics.json", json.dumps(numbers, indent=2) + "\n")
    return numbers


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("diagnose", __doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder or Hub id of a model")
    add("--pretrained_teacher_model", help="a diffusion model, to compare with")
    add("--guidance_scale", type=float, default=1.0, help="look at the model under this guidance (1: none)")
    add("--dataset_name", required=True, help="real images, as for training")
    add("--split", default="train", help="split of the dataset (train)")
    add("--seed", type=int, default=0, help="which images (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--output_dir", type=Path, default=Path("runs/diagnostics"), help="leaves the picture and the numbers here")
    args = parser.parse_args(argv)
    with ends_with_a_line(then="give the same command again"):
        numbers = diagnose(args)
    print(json.dumps(numbers))
    print(f"Saved {args.output_dir / 'diagnostics.png'} and {args.output_dir / 'diagnostics.json'}.")


if __name__ == "__main__":
    main()
