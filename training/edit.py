"""Edit pictures with a saved consistency or trajectory model, without training it for that.

For users of saved models. `change` works with any model; the other tasks need a model that jumps to clean images.
colorize, super_resolve and denoise need a model in pixel space.

    python training/edit.py inpaint --pretrained_model_name_or_path MODEL --images a.png b.png --mask mask.png
    python training/edit.py outpaint --pretrained_model_name_or_path MODEL --images small.png --top 0 --left 0
    python training/edit.py colorize --pretrained_model_name_or_path MODEL --images grey.png
    python training/edit.py super_resolve --pretrained_model_name_or_path MODEL --images small.png --num_samples 4
    python training/edit.py denoise --pretrained_model_name_or_path MODEL --images noisy.png --noise_level 0.4
    python training/edit.py change --pretrained_model_name_or_path MODEL --images strokes.png --noise_level 5
    python training/edit.py interpolate --pretrained_model_name_or_path MODEL --num_images 8

Tasks:

    inpaint        replace the white part of the mask
    outpaint       extend a smaller picture to the size of the model
    colorize       add colours to a grey picture
    super_resolve  enlarge a smaller picture to the size of the model
    denoise        remove noise of a known level
    change         add noise to a picture and sample from there; more noise changes more
    interpolate    go from one image of the model to another, or with a trajectory model between two --images

Writes images/*.png and grid.png to the output folder. Sample k of a picture depends only on seed + k.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


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


TASKS = {  # with their own options
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
    """Parse the command line `argv`, by default that of this process."""
    parser = parser_of("edit", __doc__)
    add = parser.add_argument
    add("task", choices=TASKS, help="Task, see above.")
    add("--pretrained_model_name_or_path", required=True, help="Model to edit with (folder or Hub id).")
    add("--revision", help="Branch, tag or commit of the model on the Hub. Default: the main branch.")
    add(
        "--images", type=Path, nargs="+", metavar="FILE", help="Pictures to edit, of the size of the model or smaller."
    )
    add("--mask", type=Path, metavar="FILE", help="Mask for inpaint; its white part is replaced.")
    add("--top", type=int, help="Rows that outpaint adds above the picture. Default: half of the new rows.")
    add("--left", type=int, help="Columns that outpaint adds on the left. Default: half of the new columns.")
    add("--num_images", type=int, help="Number of images of interpolate with both ends, at least 2. Default: 8.")
    add(
        "--noise_level",
        type=float,
        help="Noise level sigma for images in [-1, 1]: the level that denoise removes, or the level where another task"
        " starts (lower keeps more of the picture). Default: the highest level of the model.",
    )
    add(
        "--num_inference_steps",
        type=int,
        help="Number of steps. Default: 20; the default of the model for change and interpolate.",
    )
    add("--sigmas", type=float, nargs="+", help="Decreasing noise levels, instead of --num_inference_steps.")
    add("--num_samples", type=int, default=1, help="Number of results for each picture, at least 1. Default: 1.")
    add(
        "--class_labels",
        nargs="+",
        help="Class labels or names: one for all pictures, or one for each. Default: drawn from the seed.",
    )
    add(
        "--guidance_scale",
        type=float,
        help="Scale of classifier-free guidance, at least 0; 1 is no guidance. Other scales need a model with a null"
        " class. Default: 1.",
    )
    add("--seed", type=int, default=0, help="Seed of the first result of each picture. Default: 0.")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device such as cpu or cuda:0. Default: cuda if available, else cpu.",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("runs/edits"),
        help="Folder for grid.png and images/*.png. Default: runs/edits.",
    )
    add("--overwrite", action="store_true", help="Delete the images of an earlier call in --output_dir first.")
    return parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """Check that the task has all options that it needs, and none without effect.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: an option is missing or has no effect.
    """
    for name in NEEDED.get(args.task, ("images",)):
        if getattr(args, name) is None:
            raise ValueError(f"{args.task} needs --{name}.")
    for name in ("images", "mask", "top", "left", "num_images"):
        if getattr(args, name) is not None and name not in TASKS[args.task]:
            raise ValueError(f"{name} has no effect on {args.task}.")
    if args.task == "denoise" and (args.num_inference_steps or args.sigmas):
        raise ValueError("denoise takes one step from --noise_level. Leave num_inference_steps and sigmas out.")
    if args.task == "interpolate" and args.noise_level is not None:
        raise ValueError("noise_level has no effect on interpolate.")
    if args.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {args.num_samples}.")
    if args.task == "interpolate" and args.num_samples > 1:
        raise ValueError("num_samples has no effect on interpolate. Give --num_images for the number of images.")
    if args.revision is not None and Path(args.pretrained_model_name_or_path).exists():
        raise ValueError("revision has no effect: the model is a folder, and only models on the Hub have revisions.")


def read_picture(file: Path) -> Image.Image:
    """Read a picture from `file`.

    Raises:
        ValueError: the file is missing or is not a readable picture.
    """
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} can't be read as a picture: {error}") from None


def editor(pipeline: ImagePipeline, args: argparse.Namespace, pictures: list[Image.Image]) -> Any:
    """Return the function that edits one picture, given further arguments of the pipeline.

    Args:
        pipeline: the model.
        args: the parsed command line.
        pictures: the pictures of --images.

    Raises:
        ValueError: the model can't do the task, or interpolate has the wrong number of pictures.
    """
    if args.task != "change" and not isinstance(pipeline, EditingPipeline):
        raise ValueError(
            f"{args.task} needs a model that jumps to clean images, such as a ConsistencyPipeline; this is a"
            f" {type(pipeline).__name__}."
        )
    if args.task == "change":
        return lambda picture, **call: pipeline(image=picture, **call)
    method = getattr(pipeline, args.task)
    if args.task == "interpolate":
        pairs = isinstance(pipeline, CTMPipeline)
        if pairs != bool(pictures):
            raise ValueError(
                "interpolate with a trajectory model needs two --images."
                if pairs
                else "images has no effect: only trajectory models can find the noise of a picture. This model"
                " interpolates between images of its own."
            )
        return lambda picture, **call: method(*([pictures] if pairs else []), **call)
    names = {"inpaint": ("mask",), "outpaint": ("top", "left")}.get(args.task, ())
    more = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "mask" in more:
        more["mask"] = read_picture(args.mask)
    return lambda picture, **call: method(picture, **more, **call)


def edit(args: argparse.Namespace) -> None:
    """Edit all pictures, and write the results and their grid.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: the model can't be loaded or can't do the task, or an option or a picture is invalid.
    """
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
        while earlier:  # deleted once new images exist
            earlier.pop().unlink()
        for k, image in enumerate(images):
            save_image(to_pil(image), files / f"{i * len(images) + k:06d}.png")
        shown += [as_shown(one, images[0].shape) for one in [picture] if one is not None] + list(images)
    with written_aside(args.output_dir / "grid.png") as aside:
        image_grid(shown, columns=len(shown) // len(rounds)).save(aside)
    print(f"Saved {args.output_dir / 'grid.png'} and the images in {files}.")


def as_shown(picture: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Convert a picture to float32 (H, W, C) in [0, 1], enlarged to `shape`, to stand beside such images."""
    height, width, channels = shape
    picture = picture.convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(picture, dtype=np.float32).reshape(shape) / 255


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    args = parse_args(argv)
    disable_progress_bar()
    with ends_with_a_line(then="give the same command again with --overwrite"):
        edit(args)


if __name__ == "__main__":
    main()
