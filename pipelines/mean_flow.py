"""Sampling of MeanFlow models in one to a few steps (Geng et al. 2025, arXiv:2505.13447, algorithm 2)."""

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin

from ..core.conditions import Condition, call_network
from ..core.guidance import Guidance, call_guided
from ..core.solvers import heun_end
from ..core.time_labels import flow_time_up_to_infinity
from .arguments import Entries, Generators, Images, Labels, Levels, Samples, read_count, read_numbers
from .calls import one_call
from .image_pipeline import ImagePipeline, StepCallback
from .settings import saying, settings_of, takes_two_times


# what the scheduler must not do of its own, as the network jumps exactly from one of the given flow times to the next
PLAIN_SCHEDULER = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


class MeanFlowPipeline(ImagePipeline):
    """Images from a MeanFlow model, unconditional or class-conditional, in 1, 2, ... steps.

    The network gives the average velocity u of x_t = (1 - t) x0 + t noise between the flow times t > r in [0, 1], so
    that x_r = x_t - (t - r) u.

    Args:
        unet: the network, called as `unet(x_t, t, target_timestep=r, class_labels=...)`.
        scheduler: a `FlowMatchEulerDiscreteScheduler` that takes the flow times as they are (its default settings).
        vae: the autoencoder of diffusers in whose latents the network works; None for pixels.
        time_scale: the network is told this times the flow times (1000 where it began as a flow model of diffusers);
            by default what the scheduler of another pipeline says of the network, else 1.

    Raises:
        ValueError: a network with one time only; another scheduler, or one for a network of another time scale, here
            or when one is assigned.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from cm_diffusers import MeanFlowPipeline, TwoTimeModel
        >>> from cm_diffusers.models import build_unet
        >>> unet = TwoTimeModel.from_network(build_unet("jvp_tiny", (8, 8), 1))  # or from_pretrained("user/model")
        >>> pipe = MeanFlowPipeline(unet, FlowMatchEulerDiscreteScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=2, num_inference_steps=2, generator=0, output_type="np").images.shape
        (2, 8, 8, 1)
    """

    _callback_tensor_inputs = ["latents"]
    _schedulers = ("FlowMatchEulerDiscreteScheduler",)

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: ModelMixin | None = None,
        time_scale: float | None = None,
    ):
        super().__init__()
        if not takes_two_times(unet):
            raise ValueError(
                f"MeanFlowPipeline needs a network with two times, and {type(unet).__name__} takes one only: it has no"
                " argument target_timestep. Flow models are sampled by DenoisingPipeline with prediction='flow'."
            )
        self.register_to_config(time_scale=settings_of(scheduler, time_scale=time_scale).get("time_scale", 1.0))
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def accept_scheduler(self, scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
        """See `ImagePipeline`: one of default settings, told the time scale of the network."""
        scheduler = super().accept_scheduler(scheduler)
        changed = {name for name, value in PLAIN_SCHEDULER.items() if scheduler.config.get(name, value) != value}
        if changed:
            raise ValueError(f"The scheduler of a MeanFlowPipeline must leave {', '.join(sorted(changed))} alone.")
        return saying(scheduler, {"time_scale": self.config.time_scale})

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (1, 2)

    def levels_below(self, noise_level: float, num_inference_steps: int) -> list[float]:
        """See `ImagePipeline`: steps of equal length in flow time."""
        first = flow_time_up_to_infinity(noise_level)
        times = [first * (1 - k / num_inference_steps) for k in range(num_inference_steps)]
        return [noise_level, *(time / (1 - time) for time in times[1:])]

    def flow_times(self, num_inference_steps: int | None, sigmas: Levels, timesteps: Levels = None) -> list[float]:
        """Flow times from 1, evenly spaced, or those of `sigmas` or of `timesteps`; ValueError for bad ones."""
        if sum(given is not None for given in (num_inference_steps, sigmas, timesteps)) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `sigmas` and `timesteps`.")
        if num_inference_steps is not None:
            steps = read_count("num_inference_steps", num_inference_steps)
            assert steps is not None
            return [1 - k / steps for k in range(steps)]
        if timesteps is not None:
            times = read_numbers("timesteps", timesteps) or []
            highest = self.scheduler.config.num_train_timesteps
            if not times or not all(0 < time <= highest for time in times):
                raise ValueError(f"`timesteps` must be a non-empty list of numbers in (0, {highest}], got {times}.")
            if any(then >= now for now, then in zip(times, times[1:])):
                raise ValueError(f"`timesteps` must fall strictly, got {times}.")
            return [time / highest for time in times]
        levels = read_numbers("sigmas", sigmas)
        if not levels or any(math.isnan(s) or s <= 0 for s in levels):
            raise ValueError(f"`sigmas` must be a non-empty list of positive numbers, got {levels}.")
        if any(then >= now for now, then in zip(levels, levels[1:])):
            raise ValueError(f"`sigmas` must fall strictly, got {levels}.")
        return [flow_time_up_to_infinity(s) for s in levels]

    @torch.no_grad()
    @one_call
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels = None,
        num_inference_steps: int | None = None,
        sigmas: Levels = None,
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
            num_inference_steps: 1 (the default) or more steps of equal length in flow time, from pure noise; or else
            sigmas: noise levels t / (1 - t), falling, for example [inf, 1]; inf is pure noise, flow time 1.
            generator: a generator or a seed, or one per image (then an image does not depend on the others of the
                batch).
            latents: unit normal noise (batch_size, C, H, W), a tensor or an array, instead of noise from `generator`.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent" (as it is).
            return_dict: give an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; what it returns
                replaces the tensors, and `pipe._interrupt = True` ends the call.
            callback_on_step_end_tensor_inputs: which tensors it sees: "latents".
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
        self.set_levels(*self.read_levels(num_inference_steps, sigmas, timesteps, level))
        levels, first = self.noise_levels, self.scheduler.sigmas[0]
        if images is not None and first == 1:
            raise ValueError("An image with noise of an infinite level is no more than noise; leave the image out.")
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
        sample = self.begun(noise)
        if images is not None:
            sample = (1 - first) * self.encoded(images, noise) + sample
        for i, t in self.steps(self.scheduler.timesteps):
            sample, _ = self.advance(sample, i, t, levels[i], told)
            sample = self.after_step(callback_on_step_end, i, t, {"latents": sample}, names)
        return self.finish(sample, output_type, return_dict)

    def set_levels(
        self,
        num_inference_steps: int | None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        **how: Any,
    ) -> None:
        """See `ImagePipeline`: sigmas are noise levels t / (1 - t)."""
        times = self.flow_times(num_inference_steps, sigmas, timesteps)
        self.scheduler.set_timesteps(sigmas=times, device=self._execution_device)
        self.scheduler.set_begin_index(0)

    @property
    def noise_levels(self) -> list[float]:
        """See `ImagePipeline`; the scheduler's are flow times."""
        times = self.scheduler.sigmas
        return (times / (1 - times)).cpu().tolist()

    def begun(self, noise: torch.Tensor) -> torch.Tensor:
        """See `ImagePipeline`: the share of noise at the first flow time."""
        return noise.float() * self.scheduler.sigmas[0]

    def advance(
        self,
        sample: torch.Tensor,
        index: int,
        timestep: torch.Tensor,
        sigma: float,
        told: Condition | Guidance,
        **noise: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ImagePipeline`: the average velocity leads from one flow time to the next."""
        scheduler = self.scheduler
        t, r = (self.config.time_scale * time for time in scheduler.sigmas[index : index + 2])
        x, target = sample.to(self.network_dtype), {"target_timestep": r}
        output = call_guided(self.unet, x, t, told=told, sigma=sigma, **target)
        sample = scheduler.step(output.float(), timestep, sample, return_dict=False)[0]
        return sample, sample

    @torch.no_grad()
    def invert(
        self,
        images: Images,
        class_labels: Labels = None,
        num_inference_steps: int = 18,
        condition: Entries = None,
    ) -> torch.Tensor:
        """The noise that the model makes `images` of: data to noise along the ODE dx/dt = u(x, t, t).

        By Heun's method, with two network calls in each step of flow time from 0 to 1. The velocity is that of the
        model where both times are one. `pipe(latents=pipe.invert(images, labels), class_labels=labels)` gives the
        images back as far as the model is exact.

        Args:
            images: one or several, as `image` of a call.
            class_labels: one label for all or one per image, or names of classes, for a conditional model.
            num_inference_steps: number of steps, of equal length.
            condition: what else the network is told, tensors (batch_size, ...) by the names that it has for them.

        Returns:
            Noise of the unit normal scale, float32 (B, C, H, W), for `latents` of a call.

        Raises:
            ValueError: images that can't be read, labels missing or unknown, fewer than 1 step.
        """
        read_count("num_inference_steps", num_inference_steps)
        sample, told = self.read_sample(images, class_labels, condition)

        def slope(x: torch.Tensor, time: float) -> torch.Tensor:
            label = torch.tensor(self.config.time_scale * time, device=x.device)
            x, times = x.to(self.network_dtype), {"target_timestep": label}
            return call_network(self.unet, x, label, condition=told, return_dict=False, **times)[0].float()

        step = 1 / num_inference_steps
        for k in self.progress_bar(range(num_inference_steps)):
            now = slope(sample, k * step)
            sample = heun_end(sample, step, now, slope(sample + step * now, (k + 1) * step))
        self.maybe_free_model_hooks()
        return sample
