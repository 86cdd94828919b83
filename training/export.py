"""Export a model that jumps as programs that need neither this library nor, but for one, PyTorch: whole samplers.

    python training/export.py runs/mine/pipeline runs/mine/export
    python training/export.py user/model exported --num_inference_steps 1 2 4 --page
    python training/export.py user/model exported --sigmas 80 0.8 --dtype fp16

For each number of steps there are <n>_steps.onnx (ONNX) and <n>_steps.pt2 (torch.export). Noise levels, and for
models of latents the decoder, are inside. Noise, the noise of the steps (renoise), class labels and a scale of
guidance go in, so that the result depends on nothing else; images in [0, 1] come out, for any batch. sampler.json
describes the files. Each graph is run by onnxruntime in a process of its own, and its images are compared with the
pipeline's.

--page adds a page that samples in the browser: serve the folder by `python -m http.server`, or upload it as a static
Space.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: it answers --help before what takes seconds)


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
    parser = parser_of("export", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="folder or Hub id of a model")
    add("output", metavar="OUTPUT", nargs="?", type=Path, help="where the files go (runs/export)")
    add("--pretrained_model_name_or_path", help="the same as MODEL")
    add("--revision", help="revision on the Hub")
    add(
        "--num_inference_steps",
        type=int,
        nargs="+",
        help="a sampler for each number (1; with --page 1 2 4)",
    )
    add("--sigmas", type=float, nargs="+", help="noise levels, falling, of one sampler instead")
    add("--gamma", type=float, help="share of new noise between a trajectory model's jumps, in [0, 1] (its own)")
    add("--guidance", action="store_true", help="build classifier-free guidance in, with its scale as an input")
    add("--dtype", choices=list(DTYPES), default="fp32", help="precision of the networks (fp32)")
    add("--page", action="store_true", help="add a page that samples in the browser")
    add(
        "--runtime_dir",
        type=Path,
        help="folder dist of the npm package onnxruntime-web, for the page to hold",
    )
    add("--output_dir", type=Path, help="the same as OUTPUT")
    args = parser.parse_args(argv)
    for place, flag in (("model", "pretrained_model_name_or_path"), ("output", "output_dir")):
        if getattr(args, place) is not None and getattr(args, flag) is not None:
            parser.error(f"{flag} is given twice, as {place.upper()} and as --{flag}.")
    args.pretrained_model_name_or_path = args.model or args.pretrained_model_name_or_path
    args.output_dir = args.output or args.output_dir or Path("runs/export")
    if args.pretrained_model_name_or_path is None:
        parser.error("give MODEL, the folder or Hub id of a model.")
    return args


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that would change nothing, or that need a package that is missing."""
    if args.num_inference_steps is not None and args.sigmas is not None:
        raise ValueError("num_inference_steps has no effect beside --sigmas, whose number of levels is that of steps.")
    if args.runtime_dir is not None and not args.page:
        raise ValueError("runtime_dir has no effect without --page.")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise ValueError(f"{package} is not installed: pip install {package}") from None


def export(args: argparse.Namespace) -> None:
    """Write what `args` ask for. Raises ValueError for what can't be done."""
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
            f"{described['onnx']}: {(folder / described['onnx']).stat().st_size / 2**20:.1f} MiB, differs from the"
            f" pipeline by at most {found['largest_difference']:.1e}; an image takes"
            f" {1000 * found['onnxruntime_seconds']:.1f} ms in onnxruntime, {1000 * found['pipeline_seconds']:.1f} ms"
            " in the pipeline.",
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
    args = parse_args(argv)
    disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with ends_with_a_line(then="the same command writes the files anew"):
        export(args)


if __name__ == "__main__":
    main()
