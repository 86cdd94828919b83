"""Zero-shot editing with models that jump to clean images (Song et al. 2023, arXiv:2303.01469, algorithm 4)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from PIL import Image

from ..core.arrays import slerp
from ..core.measurements import Projection, averages, inside, luma, of_averages, put_into
from .arguments import Generators, Images, Samples, read_count, read_generators, read_images, read_number, read_samples
from .image_pipeline import ImagePipeline


EDITING_STEPS = 20
Masks = torch.Tensor | np.ndarray | Image.Image


class EditingPipeline(ImagePipeline):
    """Base of the pipelines whose models jump to clean images: zero-shot editing, without further training.

    After each jump to a clean image, the known part of the image is put back, and noise of the next level is added.
    The result agrees exactly with the known part, except for rounding with `output_type` "pil". The rest adapts to it
    as far as the later, lower levels allow.

    The result is not a sample of the posterior. On Gaussian data, few steps leave the rest between the unconditional
    distribution and the posterior, in mean and in spread. Many steps at low levels reach the posterior
    (`benchmarks/experiments/editing_gaussian.py`).

    Each method is a call of the pipeline, and accepts the other arguments of a call:

    - `num_inference_steps` (20 by default), `sigmas` or `timesteps`;
    - `noise_level`, by default the highest: lower levels keep more of the unknown part of the given image;
    - `class_labels`, `batch_size` for several results from one image, `generator`, `guidance_scale`, `output_type`
      and so on.

    Methods check their arguments before the network is called.

    To change an image as a whole (stroke-guided editing, image to image), call the pipeline with `image` and
    `noise_level`.
    """

    def inpaint(self, image: Images, mask: Masks, **call: Any) -> ImagePipelineOutput | tuple:
        """Generate the part of an image that lies under a mask.

        In a latent model, a latent is put back if all its pixels are known, and the result is decoded once.

        Args:
            image: one image for all or one per image, in the form of `image` of a call.
            mask: (H, W), or (n, 1, H, W) with one mask per image: a tensor or an array in [0, 1], or a PIL image, of
                the model's size. Pixels of at least 0.5 (in PIL, mid-grey) are generated.
            **call: other arguments of a call.

        Raises:
            ValueError: an argument is invalid, or masks and images differ in number.
        """
        images, new = self._images(image), self._mask(mask)
        if len(new) > 1:
            if len(images) not in (1, len(new)):
                raise ValueError(f"There must be one mask, or one mask per image, {len(images)}; got {len(new)}.")
            images = images.expand(len(new), -1, -1, -1)
        return self._edit(images, self._known(new), None, call)

    def outpaint(
        self, image: Images, top: int | None = None, left: int | None = None, **call: Any
    ) -> ImagePipelineOutput | tuple:
        """Generate the surroundings of an image.

        Args:
            image: in the form of `image` of a call, but smaller.
            top: number of rows to generate above it; by default as many as below it.
            left: number of columns to generate on its left; by default as many as on its right.
            **call: other arguments of a call.

        Raises:
            ValueError: an argument is invalid, the image is larger than the model's images, or `top` or `left` would
                move it over the edge.
        """
        images = self._images(image, "height", "width")
        rows, columns = (ours - theirs for ours, theirs in zip(self.image_shape[1:], images.shape[-2:]))
        above, before = read_count("top", top, 0), read_count("left", left, 0)
        above, before = rows // 2 if above is None else above, columns // 2 if before is None else before
        if above > rows or before > columns:
            raise ValueError(
                f"top and left must be at most {rows} and {columns}, so that the whole image fits in, got {above} and"
                f" {before}."
            )
        around = (before, columns - before, above, rows - above)
        new = F.pad(torch.zeros(1, 1, *images.shape[-2:]), around, value=1.0)
        return self._edit(F.pad(images, around), self._known(new), None, call)

    def colorize(self, image: Images, **call: Any) -> ImagePipelineOutput | tuple:
        """Colour a grey image. The luma of the result, 0.299 R + 0.587 G + 0.114 B, equals the grey values.

        Args:
            image: in the form of `image` of a call, with one channel.
            **call: other arguments of a call.

        Raises:
            ValueError: an argument is invalid, or this is not a pixel model with 3 channels.
        """
        self._check_pixels("colorize")
        if self.image_shape[0] != 3:
            raise ValueError(f"colorize needs a model of 3 channels; this model has {self.image_shape[0]}.")
        return self._edit(self._images(image, channels=1).expand(-1, 3, -1, -1), luma, None, call)

    def super_resolve(self, image: Images, **call: Any) -> ImagePipelineOutput | tuple:
        """Enlarge an image to the model's size. Averages over the result equal the pixels of the given image.

        Args:
            image: in the form of `image` of a call, but smaller. Height and width can grow by any factors.
            **call: other arguments of a call.

        Raises:
            ValueError: an argument is invalid, or this is a latent model.
        """
        self._check_pixels("super_resolve")
        images, fine = self._images(image, "height", "width"), self.image_shape[1:]
        coarse = (images.shape[-2], images.shape[-1])
        return self._edit(F.interpolate(images, fine), averages(coarse, fine), of_averages(images, fine), call)

    def denoise(self, image: Images, noise_level: float, **call: Any) -> ImagePipelineOutput | tuple:
        """Remove noise from images by one jump.

        Args:
            image: noisy images in the form of `image` of a call. Tensors and arrays can exceed [0, 1].
            noise_level: sigma, the standard deviation of the noise for images in [-1, 1], above 0. It is twice the
                standard deviation for images in [0, 1].
            **call: other arguments of a call, except those that choose levels.

        Raises:
            ValueError: an argument is invalid, or this is a latent model.
        """
        self._check_pixels("denoise")
        images, sigma = self._images(image, bounded=False), read_number("noise_level", noise_level)
        if not sigma > 0:
            raise ValueError(f"noise_level must be positive, got {sigma:g}.")
        return self(**self._arguments(call, latents=images / sigma, sigmas=[sigma], num_inference_steps=None))

    def interpolate(
        self, num_images: int = 8, generator: Generators = None, latents: Samples = None, **call: Any
    ) -> ImagePipelineOutput | tuple:
        """Interpolate between two images of the model, by noises on the arc between their two noises.

        Args:
            num_images: number of images, 2 or more, both ends included. They form one batch, of one class.
            generator: the source of the two noises, and of the noise between steps, which is the same for all images.
            latents: the two noises (2, C, H, W), instead of noises from `generator`.
            **call: other arguments of a call.

        Raises:
            ValueError: an argument is invalid, or the two noises are opposite, so that no arc is the shortest.
        """
        source = read_generators(generator)
        read_count("num_images", num_images, 2)
        ends = self.prepare_latents(
            2, source, read_samples("latents", latents, (2, *self.sample_shape)), self._execution_device
        )
        first = source[0] if isinstance(source, list) else source
        labels = self.prepare_class_labels(1, call.pop("class_labels", None), first, self._execution_device)
        seed = int(torch.randint(2**63 - 1, (), generator=first, device=first.device if first else "cpu"))
        arguments = self._arguments(
            call,
            latents=slerp(ends[0], ends[1], torch.linspace(0, 1, num_images, dtype=torch.float64)),
            class_labels=None if labels is None else labels.expand(num_images),
            generator=[seed] * num_images,
        )
        return self(**arguments)

    def jumping(self) -> dict[str, Any]:
        """Return the arguments with which a call jumps to clean images at each step.

        Raises:
            ValueError: the model can't jump to clean images.
        """
        return {}

    def _edit(self, start: torch.Tensor, project: Projection, told: torch.Tensor | None, call: dict[str, Any]) -> Any:
        """Algorithm 4: call the pipeline from `start` (n, C, H, W), and put the measurement back after each jump.

        `told` is the measured value. None stands for the measurement of `start`, encoded in a latent model.
        """
        call = dict(call)
        callback = call.pop("callback_on_step_end", None)
        names = call.pop("callback_on_step_end_tensor_inputs", ["latents"])
        self.check_callback(callback, names)
        if all(call.get(name) is None for name in ("sigmas", "timesteps")):
            steps = read_count("num_inference_steps", call.pop("num_inference_steps", None))
            call["sigmas"] = self._editing_levels(call.pop("noise_level", None), steps or EDITING_STEPS)

        def put_back(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            nonlocal told
            clean, scheduler = tensors["pred_original_sample"], self.scheduler
            told = project(self.encoded(start, clean)) if told is None else told.to(clean)
            agreeing = put_into(clean, project, told)
            latents = agreeing
            if step + 1 < len(scheduler.timesteps):
                change = scheduler.add_noise(
                    agreeing - clean, torch.zeros_like(clean), sigmas=scheduler.sigmas[step + 1]
                )  # scaled by the clean image's share in the next sample
                latents = tensors["latents"] + change
            seen = {"latents": latents, "pred_original_sample": agreeing}
            return {"latents": self.after_step(callback, step, timestep, seen, names)}

        arguments = self._arguments(
            call,
            image=start / 2 + 0.5,
            callback_on_step_end=put_back,
            callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        )
        return self(**arguments)

    def _editing_levels(self, noise_level: float | None, steps: int) -> list[float]:
        """Return the levels of an edit: the first one, then levels at which the known part influences the rest.

        On Gaussian data they come closer to the posterior than a Karras grid of the same number of levels. Half of
        that grid lies so far above the data that nothing is left of what was put back.
        """
        config = self.scheduler.config
        first = config.sigma_max if noise_level is None else read_number("noise_level", noise_level)
        if not config.sigma_min < first <= config.sigma_max:
            raise ValueError(f"noise_level must lie in ({config.sigma_min:g}, {config.sigma_max:g}], got {first:g}.")
        high, low = 4 * config.sigma_data, min(0.2 * config.sigma_data, first / 2)
        if first <= high:
            return np.geomspace(first, low, steps).tolist()
        return [first, *np.geomspace(high, low, steps - 1).tolist()]

    def _arguments(self, call: dict[str, Any], **own: Any) -> dict[str, Any]:
        """Return the arguments of a call: the user's and the method's `own`, which must not overlap."""
        own = {**self.jumping(), **own}
        twice = [name for name in own if call.get(name) is not None]
        if twice:
            raise ValueError(f"{twice[0]} can't be set here, because the method sets it. Leave it out.")
        return {**call, **own}

    def _images(
        self,
        image: Images,
        height: int | str | None = None,
        width: int | str | None = None,
        channels: int | None = None,
        bounded: bool = True,
    ) -> torch.Tensor:
        """Read images (n, C, H, W) in [-1, 1], see `read_images`, of the model's size or smaller."""
        ours = self.image_shape
        shape = (channels or ours[0], height or ours[1], width or ours[2])
        images = read_images("image", image, shape, bounded=bounded)
        if images is None:
            raise ValueError("image must be given.")
        if images.shape[-2] > ours[1] or images.shape[-1] > ours[2] or 0 in images.shape:
            raise ValueError(
                f"image must have at most the model's size of {ours[1]} x {ours[2]}, got {tuple(images.shape)}."
            )
        return images

    def _mask(self, mask: Masks) -> torch.Tensor:
        """Read a mask (n, 1, H, W): 1 for pixels to generate, 0 for known pixels."""
        if torch.is_tensor(mask) or isinstance(mask, np.ndarray):
            mask = torch.as_tensor(mask).float()
            mask = mask[None, None] if mask.ndim == 2 else mask
        new = read_images("mask", mask, (1, *self.image_shape[1:]))
        if new is None:
            raise ValueError("mask must be given.")
        return (new >= 0).float()

    def _known(self, new: torch.Tensor) -> Projection:
        """Return the measurement of the pixels outside a mask (n, 1, H, W), or of latents with only such pixels."""
        if self.vae is not None:
            new = F.max_pool2d(new, self.image_shape[1] // self.sample_shape[1])
        return inside(1 - new)

    def _check_pixels(self, method: str) -> None:
        if self.vae is not None:
            raise ValueError(
                f"{method} needs a pixel model, because known pixel values determine no single latents. Latent models"
                " have inpaint, outpaint and interpolate."
            )
