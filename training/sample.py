"""Make images with a saved model: a grid, and a folder with one file per image.

    python training/sample.py --pretrained_model_name_or_path runs/quickstart/pipeline --num_samples 64
    python training/sample.py --pretrained_model_name_or_path user/model --sigmas 80 0.8 --class_labels 3 7
    python training/sample.py --pretrained_model_name_or_path runs/mine/pipeline --class_labels cat "polar bear"

Image i is made from seed + i alone: it does not depend on the batch size or on the number of images.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


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
    parser = parser_of("sample", __doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder or Hub id of a model")
    add("--revision", help="revision on the Hub")
    add("--num_samples", type=int, default=64, help="number of images (64)")
    add("--num_inference_steps", type=int, help="1 or more for consistency models (1), 2 or more for diffusion (18)")
    add("--sigmas", type=float, nargs="+", help="noise levels, falling, instead of a number (inf: pure noise)")
    solvers = ["gamma", "heun", "euler", "ddim", "sde", "sde_2m"]
    add("--solver", choices=solvers, help="of diffusion (heun) and of trajectory models (gamma)")
    add("--s_churn", type=float, help="noise to add and take away again on the way, of heun and euler (0)")
    add("--s_tmin", type=float, help="lowest level that is churned (0)")
    add("--s_tmax", type=float, help="highest level that is churned (inf)")
    add("--s_noise", type=float, help="factor of the noise that churning adds (1)")
    add("--gamma", type=float, help="share of new noise between a trajectory model's jumps, in [0, 1] (its own)")
    add(
        "--guidance_scale",
        type=float,
        help="for models trained with --label_dropout (1: no guidance)",
    )
    add("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels of guidance (all)")
    add("--negative_class_label", help="a label or name of a class to be led away from instead of none")
    add("--class_labels", nargs="+", help="labels, or names of classes, to go round (all classes)")
    add("--seed", type=int, default=0, help="seed of the first image (0)")
    add("--batch_size", type=int, default=250, help="images made at once (250)")
    add("--dtype", choices=list(DTYPES), default="fp32", help="precision of the network (fp32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--output_dir", type=Path, default=Path("runs/samples"), help="leaves grid.png and images/*.png here")
    add("--overwrite", action="store_true", help="delete the images of an earlier call in output_dir first")
    return parser.parse_args(argv)


def check_effects(args: argparse.Namespace) -> None:
    """Raise ValueError for options that would change nothing."""
    if args.num_inference_steps is not None and args.sigmas is not None:
        raise ValueError("num_inference_steps has no effect beside --sigmas, whose number of levels is that of steps.")
    if args.revision is not None and Path(args.pretrained_model_name_or_path).exists():
        raise ValueError(
            "revision has no effect: revisions are those of a model on the Hub, and the model is a folder."
        )
    for name in ("guidance_interval", "negative_class_label"):
        if getattr(args, name) is not None and args.guidance_scale in (None, 1):
            raise ValueError(f"{name} has no effect without a --guidance_scale other than 1.")
    for name in ("s_tmin", "s_tmax", "s_noise"):
        if getattr(args, name) is not None and not args.s_churn:
            raise ValueError(f"{name} has no effect without --s_churn.")


def sample(args: argparse.Namespace) -> None:
    """Make the images that `args` ask for and write them. Raises ValueError for what can't be done."""
    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError("num_samples and batch_size must be at least 1.")
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
            while earlier:  # which stay until there are new ones
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
    args = parse_args(argv)
    disable_progress_bar()
    with ends_with_a_line(then="the same command with --overwrite makes them anew"):
        sample(args)


if __name__ == "__main__":
    main()
