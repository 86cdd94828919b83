"""Edit pictures with a saved model that jumps to clean images; it need not have been trained for that.

    python training/edit.py inpaint --pretrained_model_name_or_path MODEL --images a.png b.png --mask mask.png
    python training/edit.py outpaint --pretrained_model_name_or_path MODEL --images small.png --top 0 --left 0
    python training/edit.py colorize --pretrained_model_name_or_path MODEL --images grey.png
    python training/edit.py super_resolve --pretrained_model_name_or_path MODEL --images small.png --num_samples 4
    python training/edit.py denoise --pretrained_model_name_or_path MODEL --images noisy.png --noise_level 0.4
    python training/edit.py change --pretrained_model_name_or_path MODEL --images strokes.png --noise_level 5
    python training/edit.py interpolate --pretrained_model_name_or_path MODEL --num_images 8

inpaint makes anew what is white in the mask. change begins with a picture and noise of a level: the higher, the more
is new (any model can do it). interpolate goes from one image of the model to another; with a trajectory model, from
one of two pictures (--images) to the other. Sample k of each picture is made from seed + k alone.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from tqdm.auto import tqdm

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.files import save_image, written_aside
from cm_diffusers.engine.places import check_place, earlier_files, find_device, make_folder
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.pipelines import CTMPipeline
from cm_diffusers.pipelines.editing import EditingPipeline
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import image_grid, label_of, load_pipeline, to_pil


TASKS = {  # and the options that only they have
    "inpaint": ("images", "mask"),
    "outpaint": ("images", "top", "left"),
    "colorize": ("images",),
    "super_resolve": ("images",),
    "denoise": ("images",),
    "change": ("images",),
    "interpolate": ("images", "num_images"),
}
NEEDED = {
    "inpaint": ("images", "mask"),
    "denoise": ("images", "noise_level"),
    "change": ("images",),
    "interpolate": (),
}
LEVELS = ("num_inference_steps", "sigmas", "noise_level")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("edit", __doc__)
    add = parser.add_argument
    add("task", choices=TASKS, help="what to do")
    add("--pretrained_model_name_or_path", required=True, help="folder or Hub id of a model")
    add("--revision", help="revision on the Hub")
    add("--images", type=Path, nargs="+", metavar="FILE", help="the pictures, of the model's size or smaller")
    add("--mask", type=Path, metavar="FILE", help="white where inpaint makes the pictures anew")
    add("--top", type=int, help="rows that outpaint makes above (half of them)")
    add("--left", type=int, help="columns that outpaint makes on the left (half of them)")
    add("--num_images", type=int, help="images that interpolate makes, with both ends (8)")
    add(
        "--noise_level", type=float, help="where change begins; of the noise that denoise takes away; else the highest"
    )
    add("--num_inference_steps", type=int, help="number of steps (20; 1 of change and interpolate)")
    add("--sigmas", type=float, nargs="+", help="noise levels, falling, instead of a number of steps")
    add("--num_samples", type=int, default=1, help="images made of each picture (1)")
    add("--class_labels", nargs="+", help="labels, or names of classes: one for all, or one per picture")
    add("--guidance_scale", type=float, help="for models trained with --label_dropout (1: no guidance)")
    add("--seed", type=int, default=0, help="seed of the first sample of each picture (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--output_dir", type=Path, default=Path("runs/edits"), help="leaves grid.png and images/*.png here")
    add("--overwrite", action="store_true", help="delete the images of an earlier call in output_dir first")
    return parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that the task needs, or that would change nothing."""
    for name in NEEDED.get(args.task, ("images",)):
        if getattr(args, name) is None:
            raise ValueError(f"{args.task} needs --{name}.")
    for name in ("images", "mask", "top", "left", "num_images"):
        if getattr(args, name) is not None and name not in TASKS[args.task]:
            raise ValueError(f"{name} has no effect on {args.task}.")
    if args.task == "denoise" and (args.num_inference_steps or args.sigmas):
        raise ValueError("denoise takes one step from --noise_level; leave num_inference_steps and sigmas out.")
    if args.task == "interpolate" and args.noise_level is not None:
        raise ValueError("noise_level has no effect on interpolate.")
    if args.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {args.num_samples}.")
    if args.task == "interpolate" and args.num_samples > 1:
        raise ValueError("num_samples has no effect on interpolate, whose number of images is --num_images.")
    if args.revision is not None and Path(args.pretrained_model_name_or_path).exists():
        raise ValueError(
            "revision has no effect: revisions are those of a model on the Hub, and the model is a folder."
        )


def read_picture(file: Path) -> Image.Image:
    """A picture. Raises ValueError, which names the file, where there is none."""
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no picture that can be read: {error}") from None


def editor(pipeline: ImagePipeline, args: argparse.Namespace, pictures: list[Image.Image]) -> Any:
    """What makes images of a picture, given further arguments. Raises ValueError where the model can't."""
    if args.task != "change" and not isinstance(pipeline, EditingPipeline):
        raise ValueError(
            f"{args.task} needs a model that jumps to clean images, and this is a {type(pipeline).__name__}."
        )
    if args.task == "change":
        return lambda picture, **call: pipeline(image=picture, **call)
    method = getattr(pipeline, args.task)
    if args.task == "interpolate":
        pairs = isinstance(pipeline, CTMPipeline)
        if pairs != bool(pictures):
            raise ValueError(
                "interpolate needs two --images with a trajectory model."
                if pairs
                else "images has no effect: this model finds no noise of a picture, and interpolates between its own."
            )
        return lambda picture, **call: method(*([pictures] if pairs else []), **call)
    names = {"inpaint": ("mask",), "outpaint": ("top", "left")}.get(args.task, ())
    more = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "mask" in more:
        more["mask"] = read_picture(args.mask)
    return lambda picture, **call: method(picture, **more, **call)


def edit(args: argparse.Namespace) -> None:
    """Make the images that `args` ask for and write them. Raises ValueError for what can't be done."""
    check_options(args)
    check_place(args.output_dir)
    files = args.output_dir / "images"
    earlier = earlier_files(files, r"\d{6,}\.png", args.overwrite)
    pictures = [read_picture(file) for file in args.images or []]
    device = find_device(args.device)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, args.revision)
    make = editor(pipeline, args, pictures)
    labels = [label_of(pipeline, word) for word in args.class_labels or []]
    rounds = [None] if args.task == "interpolate" else pictures
    if len(labels) not in (0, 1, len(rounds)):
        raise ValueError(f"class_labels must be one for all or one per picture, {len(rounds)}; got {len(labels)}.")
    pipeline.to(device).set_progress_bar_config(disable=True)
    call = {name: getattr(args, name) for name in (*LEVELS, "num_images") if getattr(args, name) is not None}
    if args.guidance_scale is not None:
        call["guidance_scale"] = args.guidance_scale
    if args.task != "interpolate":
        call["generator"] = list(range(args.seed, args.seed + args.num_samples))
    elif not pictures:
        call["generator"] = args.seed

    shown = []
    for i, picture in enumerate(tqdm(rounds, unit="picture", disable=len(rounds) == 1)):
        told = {} if not labels else {"class_labels": labels[i % len(labels)]}
        images = make(picture, **call, **told, output_type="np").images
        make_folder(files)
        while earlier:  # which stay until there are new ones
            earlier.pop().unlink()
        for k, image in enumerate(images):
            save_image(to_pil(image), files / f"{i * len(images) + k:06d}.png")
        shown += [as_shown(one, images[0].shape) for one in [picture] if one is not None] + list(images)
    with written_aside(args.output_dir / "grid.png") as aside:
        image_grid(shown, columns=len(shown) // len(rounds)).save(aside)
    print(f"Saved {args.output_dir / 'grid.png'} and the images in {files}.")


def as_shown(picture: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture in a grid beside images (H, W, C) of `shape`, enlarged to their size."""
    height, width, channels = shape
    picture = picture.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(picture, dtype=np.float32).reshape(shape) / 255


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    with ends_with_a_line(then="the same command with --overwrite makes them anew"):
        edit(args)


if __name__ == "__main__":
    main()
