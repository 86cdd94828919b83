"""Prepare a dataset: check all images, bring them to one size, and write parquet files.

For users who train on images of their own or on downloaded archives. Both `--dataset_name OUTPUT` and the Hub read the
result.

    python training/prepare_data.py ~/images data/mine --resolution 64
    python training/prepare_data.py cifar-10-python.tar.gz data/cifar10
    python training/prepare_data.py cifar-10-python.tar.gz data/cifar10 --split test

SOURCE is one of:

    folder or zip of images    labels come from one subfolder for each class, or from EDM's dataset.json
    archive of CIFAR-10        the python or the binary version
    file of MNIST's images     with the file of the labels beside it

Archives are read in place, and none of their code is run. All images are read before anything is written. Unreadable
images are listed, and the program ends with code 2. The same command resumes a stopped call.

Images become 8-bit RGB, or grey if all are grey. They are rotated upright by their EXIF data, and transparent parts
become white. Deeper pixels are scaled by the common range of all images. Animations contribute their first frame.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
import argparse
import re
from pathlib import Path
from shlex import quote

import datasets
from tqdm.auto import tqdm

from cm_diffusers.engine.commands import command, parser_of
from cm_diffusers.engine.data.prepare import FILES, TRANSFORMS, Plan, Request, prepare, write_card
from cm_diffusers.engine.data.sources import open_source
from cm_diffusers.engine.places import check_place
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.engine.sharing.hub import Publisher, Push


def run(args: argparse.Namespace) -> bool:
    """Prepare the dataset, print a summary, and push it on request. Returns False if the push is incomplete.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: an option is invalid, images can't be read, or the output folder can't be used.
    """
    if not re.fullmatch(r"\w+", args.split):
        raise ValueError(f"split must be one word, got {args.split!r}.")
    if args.resolution is not None and (len(args.resolution) > 2 or min(args.resolution) < 1):
        raise ValueError(f"resolution takes one or two positive numbers, got {args.resolution}.")
    for name, default in (("hub_dataset_id", None), ("hub_private_repo", False), ("hub_timeout", 120)):
        if getattr(args, name) != default and not args.push_to_hub:
            raise ValueError(f"{name} has no effect without --push_to_hub. Add that or leave {name} out.")
    if args.transform != TRANSFORMS[0] and args.resolution is None:
        raise ValueError(f"transform {args.transform} has no effect without --resolution.")
    check_place(args.output, "OUTPUT")
    source, publisher = open_source(args.source, args.split), None
    if args.push_to_hub:
        publisher = Publisher(
            args.hub_dataset_id or args.output.resolve().name, args.hub_private_repo, tqdm.write, kind="dataset"
        )
        publisher.check()
    datasets.disable_progress_bars()  # bars of single files; the whole call has its own
    resolution = args.resolution and (args.resolution * 2)[:2]
    print(*source.said, sep="\n", end="\n" if source.said else "")
    asked = Request(source.fingerprint, resolution, args.transform, args.channels)
    plan = prepare(source, args.output, args.split, asked)
    say_what_is_there(plan, args)
    if publisher is None:
        return True
    write_card(args.output, publisher.repo_id.split("/")[-1], plan)
    publisher.push(Push(args.output, f"Upload {args.split}", files=FILES))
    if publisher.finish(args.hub_timeout):
        print(f"Pushed to {publisher.url}: --dataset_name {publisher.repo_id}")
        return True
    print("The push is incomplete. Run the same command again to send the rest.")
    return False


def say_what_is_there(plan: Plan, args: argparse.Namespace) -> None:
    """Print the facts of the prepared dataset and the command that trains on it."""
    channels, height, width = plan.shape
    classes = f" in {len(plan.classes)} classes" if plan.classes else ""
    print(f"{args.output / args.split}: {plan.count} images of {channels} x {height} x {width}{classes}")
    for line in plan.ranges:
        print(line)
    if plan.enlarged:
        print(f"WARNING: {plan.enlarged} images are smaller than that and are enlarged.")
    split = "" if args.split == "train" else f" --split {args.split}"
    conditional = " --class_conditional" if plan.classes else ""
    folders = f"--dataset_name {quote(str(args.output))} --output_dir {quote(f'runs/{args.output.resolve().name}')}"
    print(f"Train on it:  {command('train_consistency')} --method ect{split}{conditional} {folders}")


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    parser = parser_of("prepare_data", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="Folder, zip, archive or file of images, see above.")
    add("output", metavar="OUTPUT", type=Path, help="Folder of the dataset, with a subfolder for each split.")
    add(
        "--split",
        default="train",
        help="Name of the split to write, and to read if SOURCE has several. Default: train.",
    )
    add(
        "--resolution",
        type=int,
        nargs="+",
        help="Size in pixels: one number for a square, or height and width. Default: as is.",
    )
    add(
        "--transform",
        choices=TRANSFORMS,
        default="center_crop",
        help="How images get the aspect ratio of --resolution: center_crop crops them in the centre, stretch distorts"
        " them. Default: center_crop.",
    )
    add(
        "--channels",
        type=int,
        choices=(1, 3),
        help="Number of channels: 1 for grey, 3 for RGB. Default: 1 if all images are grey.",
    )
    add("--push_to_hub", action="store_true", help="Publish the result as a Hub dataset.")
    add("--hub_dataset_id", help="Hub repository, as user/name or name. Default: the name of the folder OUTPUT.")
    add("--hub_private_repo", action="store_true", help="Make the Hub repository private if it is created.")
    add(
        "--hub_timeout",
        type=float,
        default=120,
        help="Seconds to keep trying while the Hub is unreachable. Default: 120.",
    )
    args = parser.parse_args(argv)
    with ends_with_a_line("OUTPUT"):
        done = run(args)
    raise SystemExit(0 if done else 1)


if __name__ == "__main__":
    main()
