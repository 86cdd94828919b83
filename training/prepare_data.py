"""Make a dataset of images of one size out of files: parquet that `--dataset_name OUTPUT` and the Hub read.

    python training/prepare_data.py ~/images data/mine --resolution 64
    python training/prepare_data.py cifar-10-python.tar.gz data/cifar10
    python training/prepare_data.py cifar-10-python.tar.gz data/cifar10 --split test

SOURCE is a folder (with a folder per class, or EDM's dataset.json, for labels) or a zip of images, CIFAR-10's archive
(python or binary), or a file of MNIST's images beside that of its labels. Nothing is unpacked, and nothing in it run.
Every image is read before anything is written; those that can't be are listed, and the program ends with code 2.
Images become 8-bit RGB, or grey where all are; they are turned upright, transparency is laid over white, pixels of
more than 8 bits are scaled by the range that all images have, and of an animation the first picture is taken.
Stopped, the same command goes on where it was.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


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
    """Whether all is where it should be. Raises ValueError for what can't be prepared, or not there."""
    if not re.fullmatch(r"\w+", args.split):
        raise ValueError(f"split must be one word, got {args.split!r}.")
    if args.resolution is not None and (len(args.resolution) > 2 or min(args.resolution) < 1):
        raise ValueError(f"resolution takes one or two positive numbers, got {args.resolution}.")
    for name, default in (("hub_dataset_id", None), ("hub_private_repo", False), ("hub_timeout", 120)):
        if getattr(args, name) != default and not args.push_to_hub:
            raise ValueError(f"{name} is for --push_to_hub, which is not given.")
    if args.transform != TRANSFORMS[0] and args.resolution is None:
        raise ValueError(f"transform {args.transform} has no effect without --resolution.")
    check_place(args.output, "OUTPUT")
    source, publisher = open_source(args.source, args.split), None
    if args.push_to_hub:
        publisher = Publisher(
            args.hub_dataset_id or args.output.resolve().name, args.hub_private_repo, tqdm.write, kind="dataset"
        )
        publisher.check()
    datasets.disable_progress_bars()  # those of single files; the whole has one
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
    print("Not all of it is on the Hub; the same command sends it again.")
    return False


def say_what_is_there(plan: Plan, args: argparse.Namespace) -> None:
    channels, height, width = plan.shape
    classes = f" in {len(plan.classes)} classes" if plan.classes else ""
    print(f"{args.output / args.split}: {plan.count} images of {channels} x {height} x {width}{classes}")
    for line in plan.ranges:
        print(line)
    if plan.enlarged:
        print(f"WARNING: {plan.enlarged} of them were smaller, and are enlarged.")
    split = "" if args.split == "train" else f" --split {args.split}"
    conditional = " --class_conditional" if plan.classes else ""
    folders = f"--dataset_name {quote(str(args.output))} --output_dir {quote(f'runs/{args.output.resolve().name}')}"
    print(f"Train on it:  {command('train_consistency')} --method ect{split}{conditional} {folders}")


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("prepare_data", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="folder, zip, archive or file of images")
    add("output", metavar="OUTPUT", type=Path, help="folder of the dataset; each split gets a folder in it")
    add("--split", default="train", help="name of the split, and which one where SOURCE holds several (train)")
    add("--resolution", type=int, nargs="+", help="side, or height and width, in pixels (as the images are)")
    add(
        "--transform",
        choices=TRANSFORMS,
        default="center_crop",
        help="crop the middle, or stretch all of an image, to the shape of the resolution (center_crop)",
    )
    add("--channels", type=int, choices=(1, 3), help="1 for grey, 3 for RGB (grey where all images are)")
    add("--push_to_hub", action="store_true", help="publish it as a dataset")
    add("--hub_dataset_id", help="user/name, or name (that of OUTPUT)")
    add("--hub_private_repo", action="store_true", help="if the repository has to be made, make it private")
    add("--hub_timeout", type=float, default=120, help="seconds to keep trying while the Hub is out of reach (120)")
    args = parser.parse_args(argv)
    with ends_with_a_line("OUTPUT"):
        done = run(args)
    raise SystemExit(0 if done else 1)


if __name__ == "__main__":
    main()
