"""Draw what a saved model predicts at each noise level, to find out why its samples are bad.

For developers of models in pixel space. The loss of consistency methods does not measure quality; these pictures do:

- one real image with noise of 16 levels, and its denoised versions
- with a teacher, one-step samples beside the endpoints of the teacher's ODE, and their distance `consistency_error`
- tangents beside finite differences of neighbouring noise levels, and their relative distance `tangent_difference`

    python training/diagnose.py --pretrained_model_name_or_path runs/mnist_scd_small/pipeline \\
        --pretrained_teacher_model runs/mnist_trigflow_small/pipeline --dataset_name ylecun/mnist

Writes diagnostics.png and diagnostics.json to the output folder.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


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
    """Write diagnostics.png and diagnostics.json to the output folder, and return the numbers.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: the model can't be loaded or is a latent model, the data do not fit it, or guidance is impossible.
    """
    check_place(args.output_dir)
    device = find_device(args.device)
    pipeline = load_pipeline(args.pretrained_model_name_or_path).to(device)
    if pipeline.vae is not None:
        raise ValueError("the model works on latents, which can't be drawn. Give a model in pixel space.")
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
            raise ValueError("guidance_scale needs a model with a null class, trained with --label_dropout.")
        denoiser = Guided(denoiser, args.guidance_scale, nulls_of(null))
    numbers = save_diagnostics(
        denoiser,
        images,
        condition,
        args.output_dir / "diagnostics.png",
        teacher=teacher,
        sigma_max=pipeline.scheduler.config.get("sigma_max", 80.0),
        network=pipeline.unet if args.guidance_scale == 1 else None,  # guidance has no tangents
    )
    replace_file(args.output_dir / "diagnostics.json", json.dumps(numbers, indent=2) + "\n")
    return numbers


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    parser = parser_of("diagnose", __doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Model to examine (folder or Hub id).")
    add("--pretrained_teacher_model", help="Diffusion model to compare with (folder or Hub id). Default: none.")
    add(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="Scale of classifier-free guidance, at least 0; 1 is no guidance. Default: 1.",
    )
    add("--dataset_name", required=True, help="Dataset of real images: a Hub id, a parquet file, a folder or digits.")
    add("--split", default="train", help="Split of the dataset to read. Default: train.")
    add("--seed", type=int, default=0, help="Seed that selects the images. Default: 0.")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device such as cpu or cuda:0. Default: cuda if available, else cpu.",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("runs/diagnostics"),
        help="Folder for the picture and the numbers. Default: runs/diagnostics.",
    )
    args = parser.parse_args(argv)
    with ends_with_a_line(then="give the same command again"):
        numbers = diagnose(args)
    print(json.dumps(numbers))
    print(f"Saved {args.output_dir / 'diagnostics.png'} and {args.output_dir / 'diagnostics.json'}.")


if __name__ == "__main__":
    main()
