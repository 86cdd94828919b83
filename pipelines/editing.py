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
    """Base of the pipelines whose models jump to clean images: what can be done with these beside making new ones.

    Nothing has to be trained for it. After each jump to a clean image, what is known of the image is put back, and
    noise of the next level is added. The result agrees with what is known exactly (but for `output_type` "pil", which
    rounds), and the rest follows it as far as the later, lower levels carry that. This is no sample of the posterior:
    on Gaussian data few steps leave the rest between what the data are without the measurement and the posterior, in
    mean and in spread, and many steps at low levels reach it (`benchmarks/experiments/editing_gaussian.py`).

    Each of the methods is a call of the pipeline, and takes its further arguments: `num_inference_steps` (20 by
    default) or `sigmas`, `noise_level` (the highest by default; less keeps more of what the image has where it is not
    known), `class_labels`, `batch_size` for several of one image, `generator`, `guidance_scale`, `output_type` and so
    on. They raise ValueError for what can't be meant, before the network is called.

    To change an image as a whole (stroke-guided editing, image to image) call the pipeline with `image` and
    `noise_level`.
    """

    def inpaint(self, image: Images, mask: Masks, **call: Any) -> ImagePipelineOutput | tuple:
        """Make the part of an image anew that lies under a mask.

        With an autoencoder the latents of which all pixels are known are put back, and the result is decoded once.

        Args:
            image: one for all or one per image, as `image` of a call.
            mask: (H, W), or (n, 1, H, W) with one per image: a tensor, an array or a PIL image of the model's size.
                From 0.5 on, in PIL from mid-grey on, a pixel is made anew.
            **call: further arguments of a call.
        """
        images, new = self._images(image), self._mask(mask)
        if len(new) > 1:
            if len(images) not in (1, len(new)):
                raise ValueError(f"There must be one mask, or one per image, {len(images)}; got {len(new)}.")
            images = images.expand(len(new), -1, -1, -1)
        return self._edit(images, self._known(new), None, call)

    def outpaint(
        self, image: Images, top: int | None = None, left: int | None = None, **call: Any
    ) -> ImagePipelineOutput | tuple:
        """Make what lies around an image.

        Args:
            image: as `image` of a call, but smaller.
            top: how many rows are made above it; by default as many as below.
            left: how many columns are made on its left; by default as many as on its right.
            **call: further arguments of a call.
        """
        images = self._images(image, "height", "width")
        rows, columns = (ours - theirs for ours, theirs in zip(self.image_shape[1:], images.shape[-2:]))
        above, before = read_count("top", top, 0), read_count("left", left, 0)
        above, before = rows // 2 if above is None else above, columns // 2 if before is None else before
        if above > rows or before > columns:
            raise ValueError(
                f"top and left must be at most {rows} and {columns}, or the image would not be seen whole; got {above}"
                f" and {before}."
            )
        around = (before, columns - before, above, rows - above)
        new = F.pad(torch.zeros(1, 1, *images.shape[-2:]), around, value=1.0)
        return self._edit(F.pad(images, around), self._known(new), None, call)

    def colorize(self, image: Images, **call: Any) -> ImagePipelineOutput | tuple:
        """Give a grey image colours, of which the luma, 0.299 R + 0.587 G + 0.114 B, is that of the image.

        Args:
            image: as `image` of a call, with one channel.
            **call: further arguments of a call.
        """
        self._check_pixels("colorize")
        if self.image_shape[0] != 3:
            raise ValueError(f"Colours are for images of 3 channels; those of this model have {self.image_shape[0]}.")
        return self._edit(self._images(image, channels=1).expand(-1, 3, -1, -1), luma, None, call)

    def super_resolve(self, image: Images, **call: Any) -> ImagePipelineOutput | tuple:
        """Make an image of the model's size of a smaller one, whose pixels are averages over its own.

        Args:
            image: as `image` of a call, but smaller. The two factors may be any.
            **call: further arguments of a call.
        """
        self._check_pixels("super_resolve")
        images, fine = self._images(image, "height", "width"), self.image_shape[1:]
        coarse = (images.shape[-2], images.shape[-1])
        return self._edit(F.interpolate(images, fine), averages(coarse, fine), of_averages(images, fine), call)

    def denoise(self, image: Images, noise_level: float, **call: Any) -> ImagePipelineOutput | tuple:
        """Take the noise away from images, by one jump.

        Args:
            image: as `image` of a call, but that tensors and arrays go beyond [0, 1] as far as the noise does.
            noise_level: sigma, the standard deviation of the noise of images in [-1, 1]: twice that in [0, 1].
            **call: further arguments of a call, but for those that choose levels.
        """
        self._check_pixels("denoise")
        images, sigma = self._images(image, bounded=False), read_number("noise_level", noise_level)
        if not sigma > 0:
            raise ValueError(f"noise_level must be positive, got {sigma:g}.")
        return self(**self._arguments(call, latents=images / sigma, sigmas=[sigma], num_inference_steps=None))

    def interpolate(
        self, num_images: int = 8, generator: Generators = None, latents: Samples = None, **call: Any
    ) -> ImagePipelineOutput | tuple:
        """The way from one image of the model to another, by the noises on the arc between those that they come of.

        Args:
            num_images: how many to make, 2 or more, with both ends; they are one batch and of one class.
            generator: the source of the two noises, and of the noise that is added between steps, the same for all.
            latents: the two noises (2, C, H, W) instead.
            **call: further arguments of a call.
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
        """The arguments by which a call jumps to clean images at each step. ValueError where the model can't."""
        return {}

    def _edit(self, start: torch.Tensor, project: Projection, told: torch.Tensor | None, call: dict[str, Any]) -> Any:
        """Algorithm 4: a call that begins with `start` (n, C, H, W) and puts `told` back after each jump.

        It is what the measurement tells of `start` where it is None, in latents if these are what the network makes.
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
                )  # of the share that the clean image has in the next sample
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
        """The levels of an edit: the first one, and then such as carry what is known into the rest.

        On Gaussian data these come closer to the posterior than as many of a Karras grid, half of which lie so far
        above the data that nothing is left of what was put back.
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
        """The arguments of a call: the user's and `own`, which must be others."""
        own = {**self.jumping(), **own}
        twice = [name for name in own if call.get(name) is not None]
        if twice:
            raise ValueError(f"{twice[0]} is not for the user to choose here.")
        return {**call, **own}

    def _images(
        self,
        image: Images,
        height: int | str | None = None,
        width: int | str | None = None,
        channels: int | None = None,
        bounded: bool = True,
    ) -> torch.Tensor:
        """Images (n, C, H, W) in [-1, 1], see `read_images`, of the model's size, or of any smaller one."""
        ours = self.image_shape
        shape = (channels or ours[0], height or ours[1], width or ours[2])
        images = read_images("image", image, shape, bounded=bounded)
        if images is None:
            raise ValueError("image must be given.")
        if images.shape[-2] > ours[1] or images.shape[-1] > ours[2] or 0 in images.shape:
            raise ValueError(
                f"image must be at most {ours[1]} x {ours[2]}, as the model's are, got {tuple(images.shape)}."
            )
        return images

    def _mask(self, mask: Masks) -> torch.Tensor:
        """What is to be made anew (n, 1, H, W), 1 there and 0 elsewhere."""
        if torch.is_tensor(mask) or isinstance(mask, np.ndarray):
            mask = torch.as_tensor(mask).float()
            mask = mask[None, None] if mask.ndim == 2 else mask
        new = read_images("mask", mask, (1, *self.image_shape[1:]))
        if new is None:
            raise ValueError("mask must be given.")
        return (new >= 0).float()

    def _known(self, new: torch.Tensor) -> Projection:
        """The pixels out of a mask (n, 1, H, W), or the latents of such pixels alone."""
        if self.vae is not None:
            new = F.max_pool2d(new, self.image_shape[1] // self.sample_shape[1])
        return inside(1 - new)

    def _check_pixels(self, method: str) -> None:
        if self.vae is not None:
            raise ValueError(
                f"{method} needs a model of pixels: what it knows of them says nothing of single latents. In latents"
                " there are inpaint, outpaint and interpolate."
            )
