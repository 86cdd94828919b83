"""Convert a checkpoint of another project into a diffusers model folder.

For users who have weights from the authors of a paper and want to sample, edit, evaluate or train with them here.

    python training/convert.py cd_imagenet64_lpips.pt runs/cd
    python training/convert.py edm-cifar10-32x32-uncond-vp.pkl runs/teacher
    python training/convert.py ema_0.999_049000.pt runs/ctm --family ctm

Supported files:

    .pt, .pth                  OpenAI's consistency and EDM models, CTM, the sCM of MNIST, cloneofsimo's models
    .pkl, training-state-*.pt  EDM, ECT and CDM, with the networks DDPM++, NCSN++ and ADM
    .safetensors               the weights of any of these

The names and shapes of the tensors identify the family. The conversion fails unless every tensor has a place in the
network. It never runs code from the file.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


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
    """Parse the command line `argv`, by default that of this process."""
    parser = parser_of("convert", __doc__)
    add = parser.add_argument
    add("source", type=Path, help="Checkpoint file to convert.")
    add("output_dir", type=Path, help="Folder for the converted model. An existing one is replaced.")
    which = parser.add_mutually_exclusive_group()
    for name, where in (("ema", "Default."), ("online", "Files training-state-*.pt hold them.")):
        what = f"Convert the {name} weights, if the file can hold both kinds. {where}"
        which.add_argument(f"--{name}", dest="weights", action="store_const", const=name, help=what)
    add("--family", choices=list(FAMILIES), help="Stop unless the file belongs to this family. Default: any.")
    add(
        "--kind",
        choices=["consistency", "diffusion"],
        help="Kind of model, if the weights do not show it. Default: guessed from the file name.",
    )
    add("--num_head_channels", type=int, help="Channels per attention head, for OpenAI's code and CTM. Default: 64.")
    add(
        "--image_size",
        type=int,
        help="Side of the images in pixels, if the weights do not show it. Default: 64; sCM 28, cloneofsimo 32.",
    )
    add(
        "--qkv_order",
        choices=["new", "legacy"],
        help="Order of attention weights: legacy for the first code of guided diffusion. Default: new.",
    )
    add(
        "--num_train_timesteps",
        type=int,
        help="Number of noise levels in the training grid. Default: 40; CTM on CIFAR-10 18. OpenAI's CT needs 201 on"
        " ImageNet and 151 on LSUN.",
    )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Convert the checkpoint, save the model folder, and print the assumptions made and the next command.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: the file can't be converted, or the folder can't be written.
    """
    check_place(args.output_dir)
    settings = {name: value for name, value in vars(args).items() if name not in ("source", "output_dir")}
    converted = convert_checkpoint(args.source, Options(**settings))
    print(f"{args.source} is {FAMILIES[converted.family]}.")
    for note in converted.notes:
        print(f"- {note}")
    result, kind = converted.result, type(converted.result).__name__
    if not isinstance(result, DiffusionPipeline):
        result.save_pretrained(args.output_dir)
        print(f"Saved {args.output_dir}. Load it with cm_diffusers.{kind}.from_pretrained.")
        return
    levels = {name: result.scheduler.config[name] for name in ("sigma_data", "sigma_min", "sigma_max")}
    facts = ", ".join(f"{name} {value:g}" for name, value in levels.items())
    print(f"- {kind}: {facts}, classes: {result.unet.config.num_class_embeds or 'none'}")
    save_pipeline(result, args.output_dir, verify=True)
    print(f"Saved {args.output_dir}. A clean process loaded it and found the same model. Sample it:")
    sampling = f"{command('sample')} --pretrained_model_name_or_path"
    print(f"    {sampling} {args.output_dir} {converted.sampling}")


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    args = parse_args(argv)
    disable_progress_bar()
    with ends_with_a_line("output_dir", "give the same command again"):
        convert(args)


if __name__ == "__main__":
    main()
