"""Sampling of consistency trajectory models (Kim et al. 2023, arXiv:2310.02279), and jumps along trajectories."""

from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin

from ..core.arrays import slerp
from ..core.conditions import Condition
from ..core.guidance import Guidance, call_guided
from ..core.solvers import heun_end
from .arguments import (
    Entries,
    Generators,
    Images,
    Labels,
    Levels,
    Samples,
    count_of,
    read_count,
    read_number,
    read_numbers,
)
from .calls import one_call
from .editing import EditingPipeline
from .image_pipeline import StepCallback
from .settings import SAMPLED_BY, check_scheduler, is_a, takes_two_times


CTM_SOLVERS = ("gamma", "euler", "heun")
INVERSE_SOLVERS = ("jump", "heun")
ONE_TIME = {name: found for name, found in SAMPLED_BY.items() if found[1] not in ("CTMPipeline", "MeanFlowPipeline")}


class CTMPipeline(EditingPipeline):
    """Generate images with a consistency trajectory model, in one step or several.

    The model is unconditional or class-conditional.

    Args:
        unet: the network, called as `unet(sample, label, target_timestep=target_label, class_labels=...)`, for example
            a `TwoTimeModel`.
        scheduler: a `CTMScheduler`.
        vae: the diffusers autoencoder of a latent model; None for a pixel model.

    Raises:
        ValueError: the network takes only one time, or `scheduler` is of another class. The scheduler is also checked
            when one is assigned.

    Examples:
        >>> from cm_diffusers import CTMPipeline, CTMScheduler, TwoTimeModel
        >>> from cm_diffusers.models import build_unet
        >>> unet = TwoTimeModel.from_network(build_unet("tiny", (8, 8), 1))  # or from_pretrained("user/model")
        >>> pipe = CTMPipeline(unet, CTMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe(batch_size=2, num_inference_steps=4, gamma=0, generator=0, output_type="pt").images
        >>> noise = pipe.invert(images, num_inference_steps=2)
        >>> pipe.jump(80 * noise, sigma_from=80, sigma_to=1.5).shape
        torch.Size([2, 1, 8, 8])
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _schedulers = ("CTMScheduler",)

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None):
        super().__init__()
        if not takes_two_times(unet):
            given = type(scheduler).__name__
            kind, pipeline = ONE_TIME.get(given, (None, None))
            raise ValueError(
                f"CTMPipeline needs a network with two times, but {type(unet).__name__} takes only one: it has no"
                " argument target_timestep. "
                + (
                    f"Its {given} belongs to {kind}: use {pipeline}."
                    if kind
                    else "Use ConsistencyPipeline for consistency models, and DenoisingPipeline for diffusion models."
                )
            )
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def accept_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """Check `scheduler`, see `ImagePipeline`.

        The network has two times, so the only other pipeline to suggest is `MeanFlowPipeline`.
        """
        mean_flow = is_a(scheduler, "FlowMatchEulerDiscreteScheduler")
        hint = " It belongs to a MeanFlow model: use MeanFlowPipeline." if mean_flow else ""
        check_scheduler("CTMPipeline", scheduler, self._schedulers, hint)
        return scheduler

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (1, 2)

    def jumping(self) -> dict[str, Any]:
        """Return the arguments of a call that jumps to clean images, see `EditingPipeline`."""
        return {"gamma": 1.0}

    @torch.no_grad()
    @one_call
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels = None,
        num_inference_steps: int | None = None,
        sigmas: Levels = None,
        gamma: float | None = None,
        solver: str = "gamma",
        generator: Generators = None,
        latents: Samples = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        condition: Entries = None,
        guidance_scale: float = 1.0,
        guidance_interval: Levels = None,
        negative_class_labels: Labels = None,
        timesteps: Levels = None,
        image: Images = None,
        noise_level: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images. By default it follows from the other arguments with one entry per image, such
                as `class_labels`, `generator`, `latents` or `image`; else it is 1.
            class_labels: one label for all images, or one per image: integers, or class names if the model has names.
                By default a class-conditional model draws them from `generator`; together with `latents` they are
                required.
            num_inference_steps: number of steps, 1 by default: on the scheduler's grid for "gamma", at Karras levels
                for the ODE solvers. Give at most one of this, `sigmas` and `timesteps`.
            sigmas: strictly decreasing noise levels, for example [80, 0.8].
            gamma: share of new noise in [0, 1], for the solver "gamma". 0 jumps from level to level; 1 jumps to clean
                images and adds noise of the next level. By default the scheduler's `gamma`.
            solver: "gamma"; or "euler" or "heun", which solve the probability-flow ODE. Their denoiser is the network
                with both times equal. Heun calls the network twice per step, but once in a last step to 0.
            generator: a `torch.Generator` or a seed, or a list with one per image. With a list, each image is
                independent of the rest of the batch.
            latents: unit normal noise (B, C, H, W) to start from, a tensor or an array, instead of noise from
                `generator`.
            output_type: "pil", "np", "pt" or "latent". "np" is an array (B, H, W, C) and "pt" a tensor (B, C, H, W),
                both in [0, 1]. "latent" is the last sample, neither decoded nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step. It can return
                `{"latents": ...}` to replace the sample, and set `pipe._interrupt = True` to end the call early.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback receives: "latents" (the
                sample) and "pred_original_sample" (the estimate of the clean sample).
            condition: further conditioning of the network, tensors (B, ...) by the names of its arguments.
            guidance_scale: the weight w of classifier-free guidance. 1 turns guidance off; a larger w moves the images
                further from those of the null class. Guidance doubles the batch of each network call.
            guidance_interval: the lowest and the highest noise level sigma with guidance; by default all levels.
            negative_class_labels: classes to move away from, instead of the null class; in the form of
                `class_labels`.
            timesteps: strictly decreasing time labels as in `scheduler.timesteps`, instead of `sigmas`.
            image: images to start from instead of pure noise: a tensor (n, C, H, W) or an array (n, H, W, C) in
                [0, 1], or PIL images, of the model's size. One image is for the whole batch.
            noise_level: sigma of the noise that is added to `image`, and the first noise level. The higher it is, the
                more of the image changes. Instead of it you can give other levels, which begin with it.

        Returns:
            An `ImagePipelineOutput` with `images` in the form of `output_type`, or the tuple `(images,)`.

        Raises:
            ValueError: an argument is invalid. This is checked before the network is called.
        """
        images, level = self.read_start(image, noise_level, sigmas, timesteps)
        self._choose_levels(num_inference_steps, sigmas, gamma, solver, timesteps, level)
        names = callback_on_step_end_tensor_inputs
        self.check_callback(callback_on_step_end, names)
        noise, plain, generator = self.prepare(
            batch_size,
            class_labels,
            condition,
            generator=generator,
            latents=latents,
            output_type=output_type,
            images=images,
        )
        told = self.guided(plain, guidance_scale, guidance_interval, negative_class_labels)
        levels, sigmas_now = self.scheduler.sigmas, self.noise_levels
        sample = self.begun(noise)
        if images is not None:
            sample = self.encoded(images, noise) + sample
        for i, t in self.steps(self.scheduler.timesteps):
            if solver == "gamma":
                sample, denoised = self.advance(sample, i, t, sigmas_now[i], told, generator=generator)
            else:
                sample, denoised = self._ode_step(sample, levels[i], levels[i + 1], told, solver)
            tensors = {"latents": sample, "pred_original_sample": denoised}
            sample = self.after_step(callback_on_step_end, i, t, tensors, names)
        return self.finish(sample, output_type, return_dict)

    @torch.no_grad()
    def jump(
        self,
        sample: torch.Tensor,
        sigma_from: Levels,
        sigma_to: Levels,
        class_labels: Labels = None,
        condition: Entries = None,
    ) -> torch.Tensor:
        """Jump along the trajectory through `sample` to another level, by one network call: G(x, t, s) of eq. 9.

        Args:
            sample: noisy samples x0 + sigma_from noise (B, C, H, W), with x0 in [-1, 1] for a pixel model.
            sigma_from: the level of `sample` in [sigma_min, sigma_max], or one level per sample (B,).
            sigma_to: the level to jump to, in the form of `sigma_from`. It can exceed `sigma_from` only if the
                scheduler has upward=True.
            class_labels: one label for all or one per sample, or class names. A class-conditional model requires them.
            condition: further conditioning of the network, tensors (B, ...) by the names of its arguments.

        Returns:
            The samples at `sigma_to`, float32 (B, C, H, W).

        Raises:
            ValueError: a level is outside its range, `sample` has another shape, or labels are missing or unknown.
        """
        if not torch.is_tensor(sample) or tuple(sample.shape[1:]) != self.sample_shape or not len(sample):
            got = tuple(sample.shape) if torch.is_tensor(sample) else type(sample).__name__
            raise ValueError(f"sample must be a tensor (batch_size, {str(self.sample_shape)[1:]}, got {got}.")
        told = self.told_of(len(sample), class_labels, condition)
        t, s = self._read_level("from", sigma_from, len(sample)), self._read_level("to", sigma_to, len(sample))
        if (s > t * (1 + 1e-6)).any() and not self.scheduler.config.upward:
            raise ValueError(
                f"This model was not trained to jump to higher levels, from {sigma_from} to {sigma_to}: its scheduler"
                " does not have upward=True. To go up, use `invert` with solver='heun'."
            )
        moved = self._jump(sample.to(self._execution_device, torch.float32), t, s, told)
        self.maybe_free_model_hooks()
        return moved

    @torch.no_grad()
    def invert(
        self,
        images: Images,
        class_labels: Labels = None,
        sigma_max: float | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        condition: Entries = None,
    ) -> torch.Tensor:
        """Find the noise from which the model generates `images`, along the trajectories and without randomness.

        `pipe(latents=pipe.invert(images, labels), class_labels=labels, gamma=0)` reconstructs the images, up to the
        model's error. If you set `sigma_max`, pass that call `sigmas` that begin with it.

        Args:
            images: one image or several, in the form of `image` of a call.
            class_labels: one label for all or one per image, or class names. A class-conditional model requires them.
            sigma_max: the highest noise level, where the inversion ends; by default the scheduler's `sigma_max`.
            num_inference_steps: number of steps between Karras levels; by default 1 for "jump" and 18 for "heun".
            solver: "jump" jumps to higher levels, for models whose scheduler has upward=True; it is their default.
                "heun" solves the probability-flow ODE in reverse, with two network calls per step.
            condition: further conditioning of the network, tensors (B, ...) by the names of its arguments.

        Returns:
            Noise of unit normal scale, float32 (B, C, H, W), for the `latents` of a call.

        Raises:
            ValueError: images are invalid, labels are missing or unknown, the solver is unknown or does not fit the
                model, or a level or number of steps is outside its range.
        """
        config = self.scheduler.config
        solver = solver or ("jump" if config.upward else "heun")
        if solver not in INVERSE_SOLVERS:
            raise ValueError(f"solver must be 'jump' or 'heun', got {solver!r}.")
        if solver == "jump" and not config.upward:
            raise ValueError(
                "solver='jump' needs a model trained to jump to higher levels, whose scheduler has upward=True;"
                " use solver='heun' for this one."
            )
        sigma_max = config.sigma_max if sigma_max is None else read_number("sigma_max", sigma_max)
        if not config.sigma_min < sigma_max <= config.sigma_max:
            raise ValueError(f"sigma_max must lie in ({config.sigma_min}, {config.sigma_max}], got {sigma_max}.")
        steps = num_inference_steps
        if steps is None:
            steps = 1 if solver == "jump" else 18
        levels = self._karras(steps, sigma_max).flip(0)
        sample, told = self.read_sample(images, class_labels, condition)
        for sigma, sigma_next in zip(self.progress_bar(levels[:-1]), levels[1:]):
            if solver == "jump":
                sample = self._jump(sample, sigma, sigma_next, told)
            else:
                sample = self._ode_step(sample, sigma, sigma_next, told, solver)[0]
        self.maybe_free_model_hooks()
        return sample / sigma_max

    @torch.no_grad()
    @one_call
    def interpolate(
        self,
        images: Images,
        class_labels: Labels = None,
        num_images: int = 8,
        num_inference_steps: int | None = None,
        num_inverse_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Interpolate between two images through noise space.

        Both images are inverted to noise. Noises on the arc between the two are then sampled without randomness,
        because noises on the straight line would have a smaller norm than the model saw in training. The first and the
        last image are the model's reconstructions of the given ones.

        Args:
            images: the two images, in the form of `image` of a call.
            class_labels: the class of both images, for a class-conditional model: one label, or two equal labels.
                Interpolation from class to class is impossible.
            num_images: number of images, 2 or more, both ends included. They form one batch.
            num_inference_steps: number of sampling steps, 1 by default.
            num_inverse_steps: number of steps of `invert`; by default that of `invert`.
            output_type: "pil", "np", "pt" or "latent". "np" is an array (N, H, W, C) and "pt" a tensor (N, C, H, W),
                both in [0, 1]. "latent" is the last sample, neither decoded nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.

        Returns:
            An `ImagePipelineOutput` with `images` in the form of `output_type`, or the tuple `(images,)`.

        Raises:
            ValueError: `images` are invalid or not two, their classes differ, `num_images` is below 2, or a number of
                steps is below 1. Or the two noises are opposite, so that no arc is the shortest.
        """
        pair, told = self.read_sample(images, class_labels, None)
        labels = told.entries.get("class_labels")
        if len(pair) != 2:
            raise ValueError(f"images must be the two to interpolate between, (2, C, H, W), got {len(pair)}.")
        count = read_count("num_images", num_images, None)
        if count is None or count < 2:
            raise ValueError(f"num_images must be at least 2, because both ends count, got {count}.")
        if labels is not None and labels[0] != labels[1]:
            raise ValueError(
                "Both images must be of one class, because classes can't be interpolated, got class_labels"
                f" {labels.tolist()}."
            )
        self.check_output(output_type)
        read_count("num_inverse_steps", num_inverse_steps)
        self._choose_levels(num_inference_steps, None, 0.0, "gamma")  # checks them before any work
        first, last = self.invert(images, labels, num_inference_steps=num_inverse_steps)
        return self(
            class_labels=None if labels is None else labels[:1].expand(count),
            num_inference_steps=num_inference_steps,
            gamma=0.0,
            latents=slerp(first, last, torch.linspace(0, 1, count, dtype=torch.float64)),
            output_type=output_type,
            return_dict=return_dict,
        )

    def targets(self, index: int) -> dict[str, torch.Tensor]:
        """Return the label of the level that network call `index` jumps to, (), see `ImagePipeline`."""
        return {"target_timestep": self.scheduler.target_timesteps[index]}

    def _choose_levels(
        self,
        num_inference_steps: int | None,
        sigmas: Levels,
        gamma: float | None,
        solver: str,
        timesteps: Levels = None,
        noise_level: float | None = None,
    ) -> None:
        """Set the levels of a call in its scheduler."""
        if solver not in CTM_SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(CTM_SOLVERS)}; got {solver!r}.")
        if solver != "gamma" and gamma is not None:
            raise ValueError(f"gamma={gamma} has no effect on the solver {solver!r}; it is for solver='gamma'.")
        gamma = None if gamma is None else read_number("gamma", gamma)
        num_inference_steps, sigmas, timesteps = self.read_levels(num_inference_steps, sigmas, timesteps, noise_level)
        if solver != "gamma" and num_inference_steps is not None and sigmas is None and timesteps is None:
            # the scheduler's own grid ends with a long jump to the floor
            sigmas = self._karras(num_inference_steps, self.scheduler.config.sigma_max)[:-1].tolist()
            num_inference_steps = None
        self.set_levels(num_inference_steps, sigmas, timesteps, gamma=gamma)

    def _karras(self, steps: int, sigma_max: float) -> torch.Tensor:
        """Return the `steps` + 1 Karras levels from `sigma_max` to the floor."""
        read_count("num_inference_steps", steps)
        return torch.from_numpy(self.scheduler.karras_sigmas(steps + 1, sigma_max))

    def _read_level(self, name: str, sigma: Levels, batch_size: int) -> torch.Tensor:
        """Read a level as a float64 tensor () or (B,)."""
        low, high = self.scheduler.config.sigma_min, self.scheduler.config.sigma_max
        level = torch.tensor(read_numbers(f"sigma_{name}", sigma) or [], dtype=torch.float64)
        level = level if count_of(sigma) else level.squeeze()
        if level.ndim and tuple(level.shape) != (batch_size,):
            raise ValueError(f"sigma_{name} must be a number or one per sample, got the shape {tuple(level.shape)}.")
        if not ((level >= low * (1 - 1e-6)) & (level <= high * (1 + 1e-6))).all():
            floor = f" ({low} stands for 0)" if low else ""
            raise ValueError(f"sigma_{name} must lie in [{low}, {high}]{floor}, got {sigma}.")
        return level

    def _network(
        self, sample: torch.Tensor, sigma: torch.Tensor, sigma_to: torch.Tensor, told: Condition | Guidance
    ) -> torch.Tensor:
        """Return the network's output F for a jump of `sample` from `sigma` to `sigma_to`."""
        network_input = self.scheduler.precondition_inputs(sample, sigma).to(self.network_dtype)
        timestep, target = (self.scheduler.labels(s, sample.device) for s in (sigma, sigma_to))
        output = call_guided(self.unet, network_input, timestep, told=told, sigma=sigma, target_timestep=target)
        return output.float()

    def _jump(
        self, sample: torch.Tensor, sigma: torch.Tensor, sigma_to: torch.Tensor, told: Condition | Guidance
    ) -> torch.Tensor:
        return self.scheduler.jump(self._network(sample, sigma, sigma_to, told), sample, sigma, sigma_to)

    def _ode_step(
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        sigma_next: torch.Tensor,
        told: Condition | Guidance,
        solver: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a step of Euler or Heun with the denoiser g(x, t, t), down or up.

        Returns the sample at `sigma_next`, and the estimate of the clean sample.
        """
        scheduler = self.scheduler
        output = self._network(sample, sigma, sigma, told)
        following = scheduler.jump(output, sample, sigma, sigma_next)
        if solver == "heun" and sigma_next > 0:
            slope = scheduler.velocity(output, sample, sigma)
            output_next = self._network(following, sigma_next, sigma_next, told)
            slope_next = scheduler.velocity(output_next, following, sigma_next)
            following = heun_end(sample, float(sigma_next - sigma), slope, slope_next)
        return following, scheduler.jump(output, sample, sigma, 0.0)
