"""Sample images from a saved model: one file for each image, and a grid of the first 100.

For users of any model of this library, from a folder or the Hub. More steps take longer and usually give better
images. Consistency models need only one.

    python training/sample.py --pretrained_model_name_or_path runs/quickstart/pipeline --num_samples 64
    python training/sample.py --pretrained_model_name_or_path user/model --sigmas 80 0.8 --class_labels 3 7
    python training/sample.py --pretrained_model_name_or_path runs/mine/pipeline --class_labels cat "polar bear"

Writes images/*.png and grid.png to the output folder. Image i depends only on seed + i and its class label, not on
the batch size or the number of images.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
import argparse
import inspect
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from tqdm.auto import tqdm

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.files import save_image, written_aside
from cm_diffusers.engine.places import check_place, earlier_files, find_device, make_folder
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.sampling import (
    captions_of,
    image_grid,
    label_of,
    labels_in_turn,
    load_pipeline,
    sample_images,
    to_pil,
)


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line `argv`, by default that of this process."""
    parser = parser_of("sample", __doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Model to sample from (folder or Hub id).")
    add("--revision", help="Branch, tag or commit of the model on the Hub. Default: the main branch.")
    add("--num_samples", type=int, default=64, help="Number of images, at least 1. Default: 64.")
    add(
        "--num_inference_steps",
        type=int,
        help="Number of noise levels: 1 or more for consistency models (default 1), 2 or more for diffusion models"
        " (default 18).",
    )
    add(
        "--sigmas",
        type=float,
        nargs="+",
        help="Decreasing noise levels, instead of --num_inference_steps; inf is pure noise.",
    )
    solvers = ["gamma", "heun", "euler", "ddim", "sde", "sde_2m"]
    add(
        "--solver",
        choices=solvers,
        help="Solver of diffusion models (default heun) and trajectory models (default gamma).",
    )
    add(
        "--s_churn",
        type=float,
        help="Amount of noise that the solvers heun and euler add before steps, at least 0. Default: 0.",
    )
    add("--s_tmin", type=float, help="Lowest noise level where --s_churn adds noise. Default: 0.")
    add("--s_tmax", type=float, help="Highest noise level where --s_churn adds noise. Default: inf.")
    add("--s_noise", type=float, help="Factor of the noise that --s_churn adds, above 0. Default: 1.")
    add(
        "--gamma",
        type=float,
        help="Share of fresh noise between the jumps of a trajectory model, in [0, 1]. Default: stored in the model.",
    )
    add(
        "--guidance_scale",
        type=float,
        help="Scale of classifier-free guidance, at least 0; 1 is no guidance. Other scales need a null class (models"
        " trained with --label_dropout) or --negative_class_label. Default: 1.",
    )
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="Lowest and highest noise level with guidance. Default: all levels.",
    )
    add("--negative_class_label", help="Class label or name that guidance moves away from, instead of the null class.")
    add("--class_labels", nargs="+", help="Class labels or names, used in turn for the images. Default: all classes.")
    add("--seed", type=int, default=0, help="Seed of the first image. Default: 0.")
    add("--batch_size", type=int, default=250, help="Number of images sampled at once, at least 1. Default: 250.")
    add("--dtype", choices=list(DTYPES), default="fp32", help="Precision of the network. Default: fp32.")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device such as cpu or cuda:0. Default: cuda if available, else cpu.",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("runs/samples"),
        help="Folder for grid.png and images/*.png. Default: runs/samples.",
    )
    add("--overwrite", action="store_true", help="Delete the images of an earlier call in --output_dir first.")
    return parser.parse_args(argv)


def check_effects(args: argparse.Namespace) -> None:
    """Check that every given option has an effect.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: an option has no effect.
    """
    if args.num_inference_steps is not None and args.sigmas is not None:
        raise ValueError(
            "num_inference_steps has no effect with --sigmas, which set the number of steps. Leave one of them out."
        )
    if args.revision is not None and Path(args.pretrained_model_name_or_path).exists():
        raise ValueError("revision has no effect: the model is a folder, and only models on the Hub have revisions.")
    for name in ("guidance_interval", "negative_class_label"):
        if getattr(args, name) is not None and args.guidance_scale in (None, 1):
            raise ValueError(f"{name} has no effect without a --guidance_scale other than 1.")
    for name in ("s_tmin", "s_tmax", "s_noise"):
        if getattr(args, name) is not None and not args.s_churn:
            raise ValueError(f"{name} has no effect without --s_churn.")


def sample(args: argparse.Namespace) -> None:
    """Sample the images, and write them and their grid.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: the model can't be loaded, or an option is invalid or not an option of this model.
    """
    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError(
            f"num_samples and batch_size must be at least 1; got {args.num_samples} and {args.batch_size}."
        )
    check_effects(args)
    check_place(args.output_dir)
    files = args.output_dir / "images"
    earlier = earlier_files(files, r"\d{6,}\.png", args.overwrite)
    device = find_device(args.device)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, args.revision, dtype=DTYPES[args.dtype])
    known = inspect.signature(pipeline.__call__).parameters
    names = ("num_inference_steps", "sigmas", "solver", "gamma", "s_churn", "s_tmin", "s_tmax", "s_noise")
    names += ("guidance_scale", "guidance_interval")
    steps = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    wrong = steps.keys() - known.keys()
    if wrong:
        raise ValueError(f"{wrong.pop()} is not an option of a {type(pipeline).__name__}.")
    if args.class_labels and pipeline.num_classes is None:
        raise ValueError("class_labels has no effect: the model is unconditional.")
    chosen = [label_of(pipeline, word) for word in args.class_labels or []]
    if args.negative_class_label is not None:
        steps["negative_class_labels"] = label_of(pipeline, args.negative_class_label)
    pipeline.to(device).set_progress_bar_config(disable=True)

    make_folder(files)
    shown, shown_labels = [], []
    with tqdm(total=args.num_samples, unit="image") as bar:
        for start in range(0, args.num_samples, args.batch_size):
            numbers = range(start, min(start + args.batch_size, args.num_samples))
            seeds = range(args.seed + numbers.start, args.seed + numbers.stop)
            labels = [chosen[i % len(chosen)] for i in numbers] if chosen else labels_in_turn(pipeline, seeds)
            images = sample_images(pipeline, seeds, labels, args.batch_size, **steps)
            while earlier:  # deleted once new images exist
                earlier.pop().unlink()
            for i, image in zip(numbers, images):
                save_image(to_pil(image), files / f"{i:06d}.png")
            shown.extend(images[: max(0, 100 - start)])
            shown_labels.extend((labels or [])[: max(0, 100 - start)])
            bar.update(len(images))
    with written_aside(args.output_dir / "grid.png") as aside:
        image_grid(shown, columns=10, captions=captions_of(pipeline, shown_labels or None)).save(aside)
    print(f"Saved {args.output_dir / 'grid.png'} and {args.num_samples} images in {files}.")


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    args = parse_args(argv)
    disable_progress_bar()
    with ends_with_a_line(then="give the same command again with --overwrite"):
        sample(args)


if __name__ == "__main__":
    main()
