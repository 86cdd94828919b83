"""Open a saved model in the browser: sample, edit pictures, and follow trajectories.

    cm-diffusers demo runs/mine/pipeline
    cm-diffusers demo user/my-model

`training/push.py --space` publishes the same page.
"""

import argparse
import functools
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.logging import disable_progress_bar
from PIL import Image, ImageOps

from cm_diffusers.core.measurements import LUMA
from cm_diffusers.pipelines import CTMPipeline
from cm_diffusers.pipelines.class_names import null_class
from cm_diffusers.pipelines.editing import EDITING_STEPS, EditingPipeline
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.pixels import to_uint8
from cm_diffusers.sampling import (
    captions_of,
    image_grid,
    labels_in_turn,
    levels_used,
    load_pipeline,
    sample_images,
)


try:
    import gradio as gr
except ModuleNotFoundError:
    print('error: the demo needs gradio: pip install "cm-diffusers[demo]"', file=sys.stderr)
    raise SystemExit(2) from None

EDITS = {  # names of the edits on the page: pipeline method, explanation
    "Inpaint": ("inpaint", "The area that you paint over is replaced."),
    "Outpaint": ("outpaint", "The picture is shown at half its size, and the model adds its surroundings."),
    "Colorize": ("colorize", "The picture is turned grey, and the model adds colours."),
    "Enlarge": ("super_resolve", "The picture is shrunk to half its size, and the model restores the details."),
    "Denoise": ("denoise", "Noise of the given level is added, and the model removes it in one jump."),
    "Change": (None, "Sampling starts from the picture, your strokes and noise. A higher noise level changes more."),
    "Interpolate": ("interpolate", "Images between two random images of the model. No picture is needed."),
}
ODE = ("heun", "euler")
SIDE = 480  # approximate side of the grid in pixels; pictures in a row have half of it
LAST_SEED = 2**31


class Demo:
    """The page's functions for one model.

    The methods take the values of the page's controls. The page shows their ValueErrors.

    Args:
        pipeline: the model.
        name: name of the model on the page.

    Raises:
        ValueError: the model's images have neither 1 nor 3 channels.
    """

    def __init__(self, pipeline: ImagePipeline, name: str):
        channels = pipeline.image_shape[0]
        if channels not in (1, 3):
            raise ValueError(f"model {name!r} makes {channels} channels; the demo can show 1 (grey) or 3 (RGB).")
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
        self.pipeline, self.name = pipeline, name
        self.options = inspect.signature(pipeline.__call__).parameters

    def sample(
        self, steps: int, sigmas: str, gamma: float, label: int, seed: int, count: int, guidance: float = 1.0
    ) -> tuple:
        """Sample a grid of `count` images, and list the noise levels at which the steps started.

        Args:
            steps: number of steps, used if `sigmas` is empty.
            sigmas: falling noise levels as text, for example "80, 0.8".
            gamma: share of fresh noise at each step, in [0, 1], for trajectory models.
            label: 0 for all classes in turn, else the position, from 1 on, among the classes that have images.
            seed: seed of the first image; the others have the next seeds. An image depends on its own seed alone.
            count: number of images.
            guidance: scale of classifier-free guidance; 1 means none.
        """
        arguments = {"sigmas": _numbers(sigmas)} if sigmas.strip() else {"num_inference_steps": steps}
        if "gamma" in self.options:
            arguments["gamma"] = gamma
        if guidance != 1:
            arguments["guidance_scale"] = guidance
        _check_filled(seed=seed)
        labels = [self.pipeline.classes[label - 1]] * count if label else None
        seeds = range(seed, seed + count)
        images = sample_images(self.pipeline, seeds, labels, batch_size=16, **arguments)
        captions = captions_of(self.pipeline, labels or labels_in_turn(self.pipeline, seeds))
        columns = math.ceil(math.sqrt(count))
        levels = ", ".join(f"{level:.4g}" for level in levels_used(self.pipeline))
        return image_grid(images, columns, SIDE // columns, captions), levels

    def jump(self, picture: Image.Image | None, label: int, seed: int, start: float, end: float) -> tuple:
        """Show a picture (default: the sample of `seed`), then with noise of level `start`, then jumped to `end`.

        `label` is the position of the class among those that have images, from 0 on.
        """
        _check_filled(seed=seed, from_noise_level=start, to_noise_level=end)
        images, labels = self._images(picture, label, seed)
        generator = torch.Generator().manual_seed(seed)
        _, noise = torch.randn((2, *images.shape), generator=generator)  # the first one is the noise of the sample
        noisy = 2 * images - 1 + start * noise
        moved = self.pipeline.jump(noisy, start, end, labels)
        return _shown(2 * images - 1), _shown(noisy, start), _shown(moved, end)

    def invert(self, picture: Image.Image | None, label: int, seed: int, steps: int) -> tuple:
        """Show a picture (default: the sample of `seed`), its noise, the image of this noise, and the error.

        `label` is the position of the class among those that have images, from 0 on; `steps` is the number of jumps
        from noise to image.
        """
        _check_filled(seed=seed)
        images, labels = self._images(picture, label, seed)
        noise = self.pipeline.invert(images, labels)
        again = self.pipeline(
            latents=noise, class_labels=labels, num_inference_steps=steps, gamma=0.0, output_type="pt"
        ).images.cpu()
        lost = (2 * (again - images)).square().mean().sqrt()
        return _shown(2 * images - 1), _shown(noise / 2), _shown(2 * again - 1), f"{lost:.3f}"

    def edit(
        self, kind: str, drawn: dict | None, label: int, seed: int, steps: int, noise_level: float | None, count: int
    ) -> tuple:
        """Show the known part of a picture (none for interpolation) and a grid of `count` edited images.

        Args:
            kind: a key of `EDITS`.
            drawn: the picture and the strokes on it, as gradio's editor gives them; by default the sample of `seed`.
            label: position of the class among those that have images, from 0 on.
            seed: seed of the first image; the others have the next seeds.
            steps: number of steps, for all edits but denoising.
            noise_level: noise level that a change starts from, or of the noise to remove.
            count: number of images.
        """
        _check_filled(seed=seed, noise_level=noise_level)
        method, drawn = EDITS[kind][0], drawn or {}
        images, labels = self._images(drawn.get("composite" if kind == "Change" else "background"), label, seed)
        call = {"class_labels": labels and labels[0], "output_type": "np"}
        if kind != "Denoise":
            call["num_inference_steps"] = steps
        if kind in ("Denoise", "Change"):
            call["noise_level"] = noise_level
        columns = math.ceil(math.sqrt(count))
        if kind == "Interpolate":
            made = self.pipeline.interpolate(count, generator=seed, **call).images
            return None, image_grid(made, columns, SIDE // columns)
        if kind == "Inpaint":
            call["mask"] = _painted(drawn.get("layers") or [], images.shape[-2:])
        elif kind in ("Outpaint", "Enlarge"):
            images = F.interpolate(images, scale_factor=0.5, mode="area")
        elif kind == "Colorize":
            images = (images * torch.tensor(LUMA).reshape(3, 1, 1)).sum(1, keepdim=True)
        elif kind == "Denoise":
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
            images = images + noise_level / 2 * noise  # the noise level refers to images in [-1, 1], not [0, 1]
        known = torch.where(call["mask"] > 0, 0.5, images) if kind == "Inpaint" else images
        begin = getattr(self.pipeline, method) if method else self.pipeline
        seeds = list(range(seed, seed + count))
        made = begin(image=images.expand(count, -1, -1, -1), generator=seeds, **call).images
        return _shown(2 * known.clamp(0, 1) - 1), image_grid(made, columns, SIDE // columns)

    def _edits(self) -> list[str]:
        """Names of the edits that the model supports."""
        names = list(EDITS)
        if not isinstance(self.pipeline, EditingPipeline) or self.pipeline.scheduler.config.get("solver") in ODE:
            return ["Change"]  # diffusion models and mean flows
        if self.pipeline.image_shape[0] != 3:
            names.remove("Colorize")
        if self.pipeline.vae is not None:
            names = [name for name in names if name not in ("Colorize", "Enlarge", "Denoise")]
        if isinstance(self.pipeline, CTMPipeline):
            names.remove("Interpolate")
        return names

    def _images(self, picture: Image.Image | None, label: int, seed: int) -> tuple[torch.Tensor, list[int] | None]:
        """The picture (default: the sample of `seed`) as images (1, C, H, W) in [0, 1], and its class labels."""
        channels, height, width = self.pipeline.image_shape
        labels = None if self.pipeline.num_classes is None else [self.pipeline.classes[label]]
        if picture is None:
            images = sample_images(self.pipeline, range(seed, seed + 1), labels, num_inference_steps=2)
        else:
            picture = ImageOps.fit(to_uint8(picture, channels), (width, height))
            images = np.asarray(picture, dtype=np.float32).reshape(1, height, width, channels) / 255
        return torch.from_numpy(images).permute(0, 3, 1, 2), labels

    # --- the page ----------------------------------------------------------------------------------------------

    def page(self) -> gr.Blocks:
        """Build the page; call `launch` on it."""
        channels, height, width = self.pipeline.image_shape
        classes = f", {self.pipeline.num_classes} classes" if self.pipeline.num_classes is not None else ""
        about = f"Images of {width} x {height} pixels, {'grey' if channels == 1 else 'RGB'}{classes}."
        with gr.Blocks(title=self.name, analytics_enabled=False) as page:
            gr.Markdown(f"# {self.name}\n{about}")
            with gr.Tab("Sample"):
                self._sample_tab(page)
            with gr.Tab("Edit"):
                self._edit_tab()
            if isinstance(self.pipeline, CTMPipeline) and self.pipeline.vae is None:
                with gr.Tab("Jump"):
                    self._jump_tab()
                with gr.Tab("Invert"):
                    self._invert_tab()
        return page

    def _sample_tab(self, page: gr.Blocks) -> None:
        usual = self.pipeline.default_steps[0]
        config = self.pipeline.scheduler.config
        with gr.Row():
            with gr.Column(scale=1):
                steps = gr.Slider(min(usual, 2), 8 if usual == 1 else 40, usual, step=1, label="Steps")
                sigmas = gr.Textbox(
                    value="",
                    label="Noise levels (sigma)",
                    info="falling levels, used instead of the number of steps",
                    placeholder=f"{config.get('sigma_max', 80.0):g}, 0.8",
                    visible="sigmas" in self.options,
                )
                gamma = gr.Slider(
                    0,
                    1,
                    config.get("gamma", 0.0),
                    label="Gamma",
                    info="0: deterministic jumps; 1: fresh noise at each step",
                    visible="gamma" in self.options,
                )
                guidance = gr.Slider(
                    0,
                    5,
                    1,
                    step=0.1,
                    label="Guidance",
                    info="1: none; more: images follow the class more strongly",
                    visible=null_class(self.pipeline.unet) is not None,
                )
                label, seed = self._class_and_seed("all in turn")
                count = gr.Slider(1, 64, 16, step=1, label="Number of images")
                button = gr.Button("Make images", variant="primary")
            with gr.Column(scale=2):
                grid = _picture("Images", buttons=["download", "fullscreen"])
                levels = gr.Textbox(label="Noise levels used (sigma)")
        inputs = [steps, sigmas, gamma, label, seed, count, guidance]
        _on([button.click, sigmas.submit, page.load], self.sample, inputs, [grid, levels])

    def _edit_tab(self) -> None:
        names = self._edits()
        gr.Markdown("Pictures are cropped to the model's size. Without a picture, the sample of the seed is edited.")
        with gr.Row():
            with gr.Column(scale=1):
                kind = gr.Radio(names, value=names[0], label="What to do")
                about = gr.Markdown(EDITS[names[0]][1])
                drawn = gr.ImageEditor(
                    label="Your picture",
                    type="pil",
                    image_mode="RGBA",
                    sources=["upload", "clipboard"],
                    height=300,
                )
                label, seed = self._class_and_seed()
                steps = gr.Slider(1, 40, EDITING_STEPS, step=1, label="Steps")
                level = gr.Number(1.0, label="Noise level (sigma)", info="for Change and Denoise only")
                count = gr.Slider(2, 16, 4, step=1, label="Number of images")
                button = gr.Button("Edit", variant="primary")
            with gr.Column(scale=2):
                known = _picture("Known part", buttons=[])
                grid = _picture("Edited", buttons=["download", "fullscreen"])
        kind.change(lambda name: EDITS[name][1], kind, about, api_name="about", api_visibility="private")
        _on([button.click], self.edit, [kind, drawn, label, seed, steps, level, count], [known, grid])

    def _jump_tab(self) -> None:
        config = self.pipeline.scheduler.config
        gr.Markdown(
            "One network call along the trajectory through a noisy picture, from one noise level to a"
            f" {'lower or a higher' if config.upward else 'lower'} one, in"
            f" [{config.sigma_min:g}, {config.sigma_max:g}]. The page shows noisy pictures with less contrast."
        )
        with gr.Row():
            with gr.Column(scale=1):
                picture, label, seed = self._start()
                with gr.Row():
                    start = gr.Number(min(5.0, config.sigma_max), label="From noise level", min_width=100)
                    end = gr.Number(min(0.5, config.sigma_max / 10), label="To noise level", min_width=100)
                button = gr.Button("Jump", variant="primary")
            with gr.Column(scale=2):
                shown = _row("Picture", "With noise", "After the jump")
        _on([button.click], self.jump, [picture, label, seed, start, end], shown)

    def _invert_tab(self) -> None:
        way = "one jump up" if self.pipeline.scheduler.config.upward else "18 steps of Heun's method"
        gr.Markdown(f"Find the noise from which the model makes a picture, by {way}, then make the picture again.")
        with gr.Row():
            with gr.Column(scale=1):
                picture, label, seed = self._start()
                steps = gr.Slider(1, 8, 1, step=1, label="Jumps back")
                button = gr.Button("Invert", variant="primary")
            with gr.Column(scale=2):
                shown = _row("Picture", "Its noise", "Made again")
                lost = gr.Textbox(label="Error (root mean square of pixels in [-1, 1])")
        _on([button.click], self.invert, [picture, label, seed, steps], [*shown, lost])

    def _start(self) -> tuple[gr.Image, gr.Dropdown, gr.Number]:
        """The controls for the picture, class and seed to start from."""
        label = "Your picture (default: the sample of the seed)"
        picture = gr.Image(label=label, type="pil", image_mode=None, sources=["upload", "clipboard"], height=200)
        return picture, *self._class_and_seed()

    def _class_names(self) -> list[str]:
        """Names of the classes that have images, or their numbers; repeated names also get their numbers."""
        names = self.pipeline.id2label or {label: str(label) for label in self.pipeline.classes or [0]}
        often = Counter(names.values())
        return [name if often[name] == 1 else f"{name} ({label})" for label, name in names.items()]

    def _class_and_seed(self, *more: str) -> tuple[gr.Dropdown, gr.Number]:
        """A dropdown of `more` and the classes, by index, hidden for unconditional models; and a seed."""
        known = self.pipeline.num_classes is not None
        choices = [*more, *self._class_names()]
        with gr.Row():
            label = gr.Dropdown(choices, value=choices[0], type="index", label="Class", visible=known, min_width=100)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LAST_SEED, min_width=100)
        return label, seed


def _picture(label: str, **settings) -> gr.Image:
    """A picture for display; its label is hidden, because it would cover a corner."""
    return gr.Image(label=label, show_label=False, format="png", interactive=False, **settings)


def _painted(layers: list[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """Mask (H, W) of `size`, cropped like the picture: 1 where something is painted, 0 elsewhere."""
    if not any(np.asarray(layer)[..., 3].any() for layer in layers):
        raise ValueError("Nothing is painted. Paint over the area to replace.")
    masks = [ImageOps.fit(layer.getchannel("A"), size[::-1], Image.Resampling.BOX) for layer in layers]
    return torch.from_numpy(np.max([np.asarray(mask) > 0 for mask in masks], 0)).float()


def _row(*titles: str) -> list[gr.Image]:
    """Pictures in a row, each under its title."""
    pictures = []
    with gr.Row():
        for title in titles:
            with gr.Column(min_width=100):
                gr.Markdown(title)
                pictures.append(_picture(title, buttons=[]))
    return pictures


def _on(triggers: list[Callable], function: Callable, inputs: list, outputs: list) -> None:
    """Call `function` on the page's events, one call at a time, because parallel calls would not be faster."""

    @functools.wraps(function)
    def shown(*values):
        try:
            return function(*values)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    gr.on(triggers, shown, inputs, outputs, api_name=function.__name__, concurrency_limit=1, concurrency_id="model")


def _numbers(text: str) -> list[float]:
    """Parse numbers separated by commas or spaces."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"Noise levels must be falling numbers such as 80, 0.8; got {text!r}.") from None


def _check_filled(**values: float | None) -> None:
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name.replace('_', ' ').capitalize()} is empty; give a number.")


def _shown(sample: torch.Tensor, sigma: float = 0.0) -> Image.Image:
    """Picture of x0 + sigma noise (1, C, H, W), with the contrast reduced to fit the range."""
    image = (sample / (1 + 2 * sigma)).cpu().permute(0, 2, 3, 1).numpy() / 2 + 0.5
    return image_grid(image, 1, SIDE // 2)


def load_page(name_or_path: str, revision: str | None = None) -> gr.Blocks:
    """Build the page of a saved model, from a folder or the Hub.

    Raises:
        ValueError: there is no such model, or the page can't show it.
    """
    disable_progress_bar()
    return Demo(load_pipeline(name_or_path, revision), name_or_path).page()


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and serve the page."""
    parser = argparse.ArgumentParser(
        prog="cm-diffusers demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FOLDER_OR_REPO", help="Folder or Hub id of the model.")
    parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub. Default: the main branch.")
    parser.add_argument("--port", type=int, help="Port of the page. Default: the first free one from 7860 on.")
    parser.add_argument(
        "--share", action="store_true", help="Make a public link for a week, through the servers of gradio."
    )
    args = parser.parse_args(argv)
    try:
        load_page(args.model, args.revision).launch(server_port=args.port, share=args.share, show_error=True)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
