"""Export a saved model as complete samplers for ONNX and torch.export, which run without this library.

For developers who use a consistency or trajectory model in another program, in the browser or on a device.

    python training/export.py runs/mine/pipeline runs/mine/export
    python training/export.py user/model exported --num_inference_steps 1 2 4 --page
    python training/export.py user/model exported --sigmas 80 0.8 --dtype fp16

Writes <n>_steps.onnx (ONNX) and <n>_steps.pt2 (torch.export) for each number of steps n, and sampler.json, which
describes them:

- Inputs: noise, the noise of later steps (renoise), class labels, and the guidance scale, for any batch size.
- Outputs: images in [0, 1]. They depend on the inputs alone.
- Inside: the network, the noise levels, and the decoder of a latent model.

The ONNX files do not need PyTorch. Each is run in onnxruntime, in a separate process, and its images are compared with
the pipeline's.

--page adds a page that samples in the browser. Serve the folder with `python -m http.server`, or upload it as a static
Space.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
import argparse
import logging
import warnings
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.places import check_place, make_folder
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.sampling import load_pipeline


DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line `argv`, by default that of this process."""
    parser = parser_of("export", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="Model to export (folder or Hub id).")
    add("output", metavar="OUTPUT", nargs="?", type=Path, help="Folder for the files. Default: runs/export.")
    add("--pretrained_model_name_or_path", help="Model to export, the same as MODEL.")
    add("--revision", help="Branch, tag or commit of the model on the Hub. Default: the main branch.")
    add(
        "--num_inference_steps",
        type=int,
        nargs="+",
        help="Numbers of steps, with one sampler for each. Default: 1, or 1 2 4 with --page.",
    )
    add(
        "--sigmas",
        type=float,
        nargs="+",
        help="Decreasing noise levels of a single sampler, instead of --num_inference_steps.",
    )
    add(
        "--gamma",
        type=float,
        help="Share of fresh noise between the jumps of a trajectory model, in [0, 1]. Default: stored in the model.",
    )
    add("--guidance", action="store_true", help="Include classifier-free guidance, with its scale as an input.")
    add("--dtype", choices=list(DTYPES), default="fp32", help="Precision of the networks. Default: fp32.")
    add("--page", action="store_true", help="Add a page that samples in the browser.")
    add(
        "--runtime_dir",
        type=Path,
        help="Folder dist of the npm package onnxruntime-web, to be copied into the page. Default: the page loads the"
        " package from a content delivery network.",
    )
    add("--output_dir", type=Path, help="Folder for the files, the same as OUTPUT.")
    args = parser.parse_args(argv)
    for place, flag in (("model", "pretrained_model_name_or_path"), ("output", "output_dir")):
        if getattr(args, place) is not None and getattr(args, flag) is not None:
            parser.error(f"{flag} is given twice, as {place.upper()} and as --{flag}. Leave one of them out.")
    args.pretrained_model_name_or_path = args.model or args.pretrained_model_name_or_path
    args.output_dir = args.output or args.output_dir or Path("runs/export")
    if args.pretrained_model_name_or_path is None:
        parser.error("MODEL is missing. Give the folder or Hub id of a model.")
    return args


def check_options(args: argparse.Namespace) -> None:
    """Check that every given option has an effect, and that the packages for ONNX are installed.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: an option has no effect, or a package is missing.
    """
    if args.num_inference_steps is not None and args.sigmas is not None:
        raise ValueError(
            "num_inference_steps has no effect with --sigmas, which set the number of steps. Leave one of them out."
        )
    if args.runtime_dir is not None and not args.page:
        raise ValueError("runtime_dir has no effect without --page.")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise ValueError(f"{package} is not installed. Install it with: pip install {package}") from None


def export(args: argparse.Namespace) -> None:
    """Export and check the samplers, and write their description and page.

    Args:
        args: the parsed command line.

    Raises:
        ValueError: the model can't be loaded or exported, or the images of a sampler differ from the pipeline's.
    """
    check_options(args)
    check_place(args.output_dir)
    from cm_diffusers.engine.deploy.page import write_page
    from cm_diffusers.engine.deploy.program import check_sampler, export_sampler, write_description

    model = args.pretrained_model_name_or_path
    pipeline = load_pipeline(model, args.revision)
    pipeline.set_progress_bar_config(disable=True)
    more = {} if args.gamma is None else {"gamma": args.gamma}
    if args.sigmas is not None:
        choices = [{"sigmas": args.sigmas}]
    else:
        choices = [{"num_inference_steps": n} for n in args.num_inference_steps or ([1, 2, 4] if args.page else [1])]
    folder, samplers = make_folder(args.output_dir), []
    for levels in choices:
        described = export_sampler(pipeline, folder, args.guidance, DTYPES[args.dtype], **levels, **more)
        try:
            found = check_sampler(pipeline, folder, described, **levels, **more)
        except ValueError:
            (folder / described["onnx"]).unlink()
            raise
        samplers.append(described | {"checked": found})
        print(
            f"{described['onnx']}: {(folder / described['onnx']).stat().st_size / 2**20:.1f} MiB. Its images differ"
            f" from the pipeline's by at most {found['largest_difference']:.1e}. An image takes"
            f" {1000 * found['onnxruntime_seconds']:.1f} ms in onnxruntime and"
            f" {1000 * found['pipeline_seconds']:.1f} ms in the pipeline.",
            flush=True,
        )
    name = model if not Path(model).exists() else Path(model).resolve().parent.name
    write_description(folder, pipeline, name, samplers)
    print(f"Saved {len(samplers)} sampler{'s' if len(samplers) > 1 else ''} in {folder}.")
    if args.page:
        write_page(folder, name, model, args.runtime_dir)
        print(f"Look at the page: python -m http.server --directory {folder}")
        print(f"Publish it: hf upload --repo-type space user/{name.split('/')[-1]}-page {folder}")


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    args = parse_args(argv)
    disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with ends_with_a_line(then="give the same command again"):
        export(args)


if __name__ == "__main__":
    main()
