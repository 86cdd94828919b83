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
    """Images from a consistency trajectory model, unconditional or class-conditional, in 1, 2, ... steps.

    Args:
        unet: the network, called as `unet(sample, label, target_timestep=label to jump to, class_labels=...)`, for
            example a `TwoTimeModel`.
        scheduler: a `CTMScheduler`.
        vae: the autoencoder of diffusers in whose latents the network works; None for pixels.

    Raises:
        ValueError: a network with one time only; another scheduler, here or when one is assigned.

    Example:
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
                f"CTMPipeline needs a network with two times, and {type(unet).__name__} takes one only: it has no"
                " argument target_timestep. "
                + (
                    f"By its {given} this is {kind}, which {pipeline} samples."
                    if kind
                    else "Models that jump to clean images alone are sampled by ConsistencyPipeline, diffusion models"
                    " by DenoisingPipeline."
                )
            )
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def accept_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """See `ImagePipeline`. Which networks have two times is known by now, so that only one other kind is left."""
        mean_flow = is_a(scheduler, "FlowMatchEulerDiscreteScheduler")
        hint = " Mean flows have two times as well; MeanFlowPipeline samples them." if mean_flow else ""
        check_scheduler("CTMPipeline", scheduler, self._schedulers, hint)
        return scheduler

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (1, 2)

    def jumping(self) -> dict[str, Any]:
        """See `EditingPipeline`."""
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
        """Make images.

        Args:
            batch_size: how many; by default as many as there are class labels, generators or latents, else 1.
            class_labels: one label for all or one per image, or names of classes where the model knows them; drawn
                from `generator` where the model wants some and neither they nor `latents` are given.
            num_inference_steps: 1 (the default) or more steps, on the scheduler's grid for "gamma", at Karras' levels
                for the ODE solvers; or else
            sigmas: the noise levels, falling, for example [80, 0.8].
            gamma: in [0, 1], for the solver "gamma": 0 jumps from level to level, 1 jumps to clean images and adds
                noise of the next level. By default the scheduler's.
            solver: "gamma", or "euler" or "heun" for the probability-flow ODE with the denoiser that the network is
                where both times are one. Heun calls the network twice per step.
            generator: a generator or a seed, or one per image (then an image does not depend on the others of the
                batch).
            latents: unit normal noise (batch_size, C, H, W), a tensor or an array, instead of noise from `generator`.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent" (as it is).
            return_dict: give an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; what it returns
                replaces the tensors, and `pipe._interrupt = True` ends the call.
            callback_on_step_end_tensor_inputs: which tensors it sees: "latents", "pred_original_sample".
            condition: what else the network is told, tensors (batch_size, ...) by the names that it has for them.
            guidance_scale: w of classifier-free guidance: 1 is none, more leads further away from what the network
                makes of no class, by two samples in each network call.
            guidance_interval: the lowest and the highest noise level at which there is guidance; all by default.
            negative_class_labels: classes to be led away from instead of none, given as class_labels are.
            timesteps: the levels by the times of `scheduler.timesteps`, instead of sigmas.
            image: what to begin with instead of pure noise, one for all or one per image: a tensor (n, C, H, W) or an
                array (n, H, W, C) in [0, 1], or PIL, of the model's size.
            noise_level: sigma, of the noise that it gets, and of the first step: the higher, the more is made anew.
                Other levels, whose first one it is, may stand for it.

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: an argument that can't be meant, before the network is called.
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
        """Where the trajectory through `sample` is at `sigma_to`, by one network call: G(x, t, s) of eq. 9.

        Args:
            sample: x0 + sigma_from noise with x0 in [-1, 1], (B, C, H, W).
            sigma_from: a level in [sigma_min, sigma_max], or one per sample (B,).
            sigma_to: as `sigma_from`, and not above it unless the scheduler says that the model jumps `upward`.
            class_labels: one label for all or one per sample, or names of classes, for a conditional model.
            condition: what else the network is told, tensors (batch_size, ...) by the names that it has for them.

        Returns:
            float32 (B, C, H, W).

        Raises:
            ValueError: levels outside their range, a sample of another shape, labels missing or unknown.
        """
        if not torch.is_tensor(sample) or tuple(sample.shape[1:]) != self.sample_shape or not len(sample):
            got = tuple(sample.shape) if torch.is_tensor(sample) else type(sample).__name__
            raise ValueError(f"sample must be a tensor (batch_size, {str(self.sample_shape)[1:]}, got {got}.")
        told = self.told_of(len(sample), class_labels, condition)
        t, s = self._read_level("from", sigma_from, len(sample)), self._read_level("to", sigma_to, len(sample))
        if (s > t * (1 + 1e-6)).any() and not self.scheduler.config.upward:
            raise ValueError(
                f"This model was not trained to jump to higher levels, from {sigma_from} to {sigma_to}. Where it was,"
                " its scheduler has upward=True; else `invert` with solver='heun' goes up."
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
        """The noise that the model makes `images` of, without randomness: data to noise along the trajectories.

        `pipe(latents=pipe.invert(images, labels), class_labels=labels, gamma=0)` gives the images back as far as the
        model is exact. With another `sigma_max`, pass `sigmas` that begin with it.

        Args:
            images: one or several, as `image` of a call.
            class_labels: one label for all or one per image, or names of classes, for a conditional model.
            sigma_max: the level to go up to; by default the scheduler's.
            num_inference_steps: number of steps, at Karras' levels; by default 1 jump, or 18 steps of Heun.
            solver: "jump", for models that jump to higher levels (`upward` of the scheduler, for which it is the
                default); "heun" solves the probability-flow ODE in reverse, by two network calls per step.
            condition: what else the network is told, tensors (batch_size, ...) by the names that it has for them.

        Returns:
            Noise of the unit normal scale, float32 (B, C, H, W), for `latents` of a call.

        Raises:
            ValueError: images that can't be read, labels missing or unknown, a solver that is unknown
                or does not suit the model, a level or a number of steps outside its range.
        """
        config = self.scheduler.config
        solver = solver or ("jump" if config.upward else "heun")
        if solver not in INVERSE_SOLVERS:
            raise ValueError(f"solver must be 'jump' or 'heun', got {solver!r}.")
        if solver == "jump" and not config.upward:
            raise ValueError(
                "solver='jump' needs a model trained to jump to higher levels, whose scheduler has upward=True;"
                " use solver='heun'."
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
        """The way from one image to another through the latent space.

        Both are inverted to noise, and what lies between these on the sphere is sampled without randomness. (The
        straight line would pass through noise of too small a norm, which the model has not seen.) The first and the
        last image are the model's reconstructions of the two.

        Args:
            images: the two, as `image` of a call.
            class_labels: the label of both, for a conditional model: one, or two that are the same. There is no way
                from class to class.
            num_images: how many to make, 2 or more, with both ends; they are one batch.
            num_inference_steps: steps of the sampling, 1 by default.
            num_inverse_steps: steps of `invert`, its default by default.
            output_type: "pil", "np" (N, H, W, C in [0, 1]) or "pt" (N, C, H, W in [0, 1]).
            return_dict: give an `ImagePipelineOutput` rather than a tuple.

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: not two images, images that `invert` refuses, two classes, fewer than 2 images or 1 step asked
                for, or two images whose noises are opposite, so that there is no one way between them.
        """
        pair, told = self.read_sample(images, class_labels, None)
        labels = told.entries.get("class_labels")
        if len(pair) != 2:
            raise ValueError(f"images must be the two to interpolate between, (2, C, H, W), got {len(pair)}.")
        count = read_count("num_images", num_images, None)
        if count is None or count < 2:
            raise ValueError(f"num_images must be at least 2, as both ends are made, got {count}.")
        if labels is not None and labels[0] != labels[1]:
            raise ValueError(
                f"Both images must be of one class, as nothing lies between two; got class_labels {labels.tolist()}."
            )
        self.check_output(output_type)
        read_count("num_inverse_steps", num_inverse_steps)
        self._choose_levels(num_inference_steps, None, 0.0, "gamma")  # which checks them, too
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
        """See `ImagePipeline`: the label of the level that it jumps to."""
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
        """Tell the scheduler the levels of a call."""
        if solver not in CTM_SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(CTM_SOLVERS)}; got {solver!r}.")
        if solver != "gamma" and gamma is not None:
            raise ValueError(f"gamma={gamma} means nothing to the solver {solver!r}; it is for 'gamma'.")
        gamma = None if gamma is None else read_number("gamma", gamma)
        num_inference_steps, sigmas, timesteps = self.read_levels(num_inference_steps, sigmas, timesteps, noise_level)
        if solver != "gamma" and num_inference_steps is not None and sigmas is None and timesteps is None:
            # the scheduler's own grid ends with a long jump to the floor
            sigmas = self._karras(num_inference_steps, self.scheduler.config.sigma_max)[:-1].tolist()
            num_inference_steps = None
        self.set_levels(num_inference_steps, sigmas, timesteps, gamma=gamma)

    def _karras(self, steps: int, sigma_max: float) -> torch.Tensor:
        """The steps + 1 levels from `sigma_max` to the floor."""
        read_count("num_inference_steps", steps)
        return torch.from_numpy(self.scheduler.karras_sigmas(steps + 1, sigma_max))

    def _read_level(self, name: str, sigma: Levels, batch_size: int) -> torch.Tensor:
        """A level as a tensor () or (B,), float64."""
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
        """The network's output F for a jump of `sample` from `sigma` to `sigma_to`."""
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
        """A step of Euler or Heun with the denoiser g(x, t, t), down or up, and what it says of the clean sample."""
        scheduler = self.scheduler
        output = self._network(sample, sigma, sigma, told)
        following = scheduler.jump(output, sample, sigma, sigma_next)
        if solver == "heun" and sigma_next > 0:
            slope = scheduler.velocity(output, sample, sigma)
            output_next = self._network(following, sigma_next, sigma_next, told)
            slope_next = scheduler.velocity(output_next, following, sigma_next)
            following = heun_end(sample, float(sigma_next - sigma), slope, slope_next)
        return following, scheduler.jump(output, sample, sigma, 0.0)
