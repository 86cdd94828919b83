"""Convert a checkpoint of another project into a folder of diffusers: safely, exactly, or not at all.

    python training/convert.py cd_imagenet64_lpips.pt runs/cd
    python training/convert.py edm-cifar10-32x32-uncond-vp.pkl runs/teacher
    python training/convert.py ema_0.999_049000.pt runs/ctm --family ctm

Read are .pt and .pth (OpenAI's consistency and EDM models, CTM, the sCM of MNIST, cloneofsimo's models), .pkl and
training-state-*.pt (EDM, ECT, CDM: DDPM++, NCSN++ and ADM), and weights of these as .safetensors. The family is
recognised by names and shapes. All tensors must find their place, and nothing in the file is run.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


# isort: split
import argparse
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from cm_diffusers.convert import FAMILIES, Options, convert_checkpoint
from cm_diffusers.engine.commands import command, parser_of
from cm_diffusers.engine.places import check_place
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.engine.saved.export import save_pipeline


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("convert", __doc__)
    add = parser.add_argument
    add("source", type=Path, help="the file")
    add("output_dir", type=Path, help="folder to write; an old one is replaced")
    which = parser.add_mutually_exclusive_group()
    for name, where in (("ema", "the default"), ("online", "training-state-*.pt has them")):
        what = f"{name} weights, where a file can hold both ({where})"
        which.add_argument(f"--{name}", dest="weights", action="store_const", const=name, help=what)
    add("--family", choices=list(FAMILIES), help="stop unless the file is of this family")
    add("--kind", choices=["consistency", "diffusion"], help="where weights don't tell (by the file's name)")
    add("--num_head_channels", type=int, help="channels per attention head, for OpenAI's code and CTM (64)")
    add("--image_size", type=int, help="side of the images, where weights don't tell (64; sCM 28, cloneofsimo 32)")
    add("--qkv_order", choices=["new", "legacy"], help="legacy: from guided diffusion's first code (new)")
    add("--num_train_timesteps", type=int, help="levels of the training's grid (40; OpenAI's CT 201, on LSUN 151)")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Write the folder and say what was done. Raises ValueError for what can't be done."""
    check_place(args.output_dir)
    settings = {name: value for name, value in vars(args).items() if name not in ("source", "output_dir")}
    converted = convert_checkpoint(args.source, Options(**settings))
    print(f"{args.source} is {FAMILIES[converted.family]}.")
    for note in converted.notes:
        print(f"- {note}")
    result, kind = converted.result, type(converted.result).__name__
    if not isinstance(result, DiffusionPipeline):
        result.save_pretrained(args.output_dir)
        print(f"Saved {args.output_dir}: cm_diffusers.{kind}.from_pretrained loads it.")
        return
    levels = {name: result.scheduler.config[name] for name in ("sigma_data", "sigma_min", "sigma_max")}
    facts = ", ".join(f"{name} {value:g}" for name, value in levels.items())
    print(f"- {kind}: {facts}, classes: {result.unet.config.num_class_embeds or 'none'}")
    save_pipeline(result, args.output_dir, verify=True)
    print(f"Saved {args.output_dir}; a clean process loaded it and found the same model. Sample it:")
    sampling = f"{command('sample')} --pretrained_model_name_or_path"
    print(f"    {sampling} {args.output_dir} {converted.sampling}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    with ends_with_a_line("output_dir", "give the same command again"):
        convert(args)


if __name__ == "__main__":
    main()
