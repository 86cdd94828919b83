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


# required settings of the scheduler: it must keep the given flow times, between which the network jumps exactly
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
    """Generate images with a MeanFlow model, in one step or several.

    The model is unconditional or class-conditional. The network predicts the average velocity u of
    x_t = (1 - t) x0 + t noise between two flow times t > r in [0, 1]. Hence x_r = x_t - (t - r) u.

    Args:
        unet: the network, called as `unet(x_t, t, target_timestep=r, class_labels=...)`.
        scheduler: a `FlowMatchEulerDiscreteScheduler` that does not change the given flow times, as by default.
        vae: the diffusers autoencoder of a latent model; None for a pixel model.
        time_scale: factor of the flow times in the network's input, 1000 for a network that was initialised from a
            diffusers flow model. By default the value in the config of `scheduler`, if another pipeline stored it
            there, else 1.

    Raises:
        ValueError: the network takes only one time. Or `scheduler` is of another class, changes the flow times, or is
            for a network of another time scale; this is also checked when one is assigned.

    Examples:
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
                f"MeanFlowPipeline needs a network with two times, but {type(unet).__name__} takes only one: it has no"
                " argument target_timestep. For flow models use DenoisingPipeline with prediction='flow'."
            )
        self.register_to_config(time_scale=settings_of(scheduler, time_scale=time_scale).get("time_scale", 1.0))
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def accept_scheduler(self, scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
        """Check `scheduler`, see `ImagePipeline`, and store the network's time scale in its config."""
        scheduler = super().accept_scheduler(scheduler)
        changed = {name for name, value in PLAIN_SCHEDULER.items() if scheduler.config.get(name, value) != value}
        if changed:
            settings = ", ".join(f"{name}={PLAIN_SCHEDULER[name]}" for name in sorted(changed))
            raise ValueError(f"The scheduler of a MeanFlowPipeline must have {settings}.")
        return saying(scheduler, {"time_scale": self.config.time_scale})

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (1, 2)

    def levels_below(self, noise_level: float, num_inference_steps: int) -> list[float]:
        """Return `num_inference_steps` noise levels from `noise_level`, in steps of equal length in flow time."""
        first = flow_time_up_to_infinity(noise_level)
        times = [first * (1 - k / num_inference_steps) for k in range(num_inference_steps)]
        return [noise_level, *(time / (1 - time) for time in times[1:])]

    def flow_times(self, num_inference_steps: int | None, sigmas: Levels, timesteps: Levels = None) -> list[float]:
        """Return the flow times in (0, 1] of a call, strictly decreasing. Exactly one argument is given.

        Args:
            num_inference_steps: number of evenly spaced flow times, from 1.
            sigmas: noise levels t / (1 - t), above 0 and strictly decreasing; inf is allowed.
            timesteps: times as in `scheduler.timesteps`: flow times multiplied by its `num_train_timesteps`.

        Raises:
            ValueError: not exactly one is given, or values are outside their range or do not decrease strictly.
        """
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
        """Generate images.

        Args:
            batch_size: number of images. By default it follows from the other arguments with one entry per image, such
                as `class_labels`, `generator`, `latents` or `image`; else it is 1.
            class_labels: one label for all images, or one per image: integers, or class names if the model has names.
                By default a class-conditional model draws them from `generator`; together with `latents` they are
                required.
            num_inference_steps: number of steps of equal length in flow time, from pure noise; 1 by default. Give at
                most one of this, `sigmas` and `timesteps`.
            sigmas: strictly decreasing noise levels t / (1 - t), for example [inf, 1]. inf is pure noise, flow time 1.
            generator: a `torch.Generator` or a seed, or a list with one per image. With a list, each image is
                independent of the rest of the batch.
            latents: unit normal noise (B, C, H, W) to start from, a tensor or an array, instead of noise from
                `generator`.
            output_type: "pil", "np", "pt" or "latent". "np" is an array (B, H, W, C) and "pt" a tensor (B, C, H, W),
                both in [0, 1]. "latent" is the last sample, neither decoded nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step. It can return
                `{"latents": ...}` to replace the sample, and set `pipe._interrupt = True` to end the call early.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback receives: only "latents" (the
                sample).
            condition: further conditioning of the network, tensors (B, ...) by the names of its arguments.
            guidance_scale: the weight w of classifier-free guidance. 1 turns guidance off; a larger w moves the images
                further from those of the null class. Guidance doubles the batch of each network call.
            guidance_interval: the lowest and the highest noise level sigma with guidance; by default all levels.
            negative_class_labels: classes to move away from, instead of the null class; in the form of
                `class_labels`.
            timesteps: strictly decreasing times as in `scheduler.timesteps`, instead of `sigmas`.
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
        self.set_levels(*self.read_levels(num_inference_steps, sigmas, timesteps, level))
        levels, first = self.noise_levels, self.scheduler.sigmas[0]
        if images is not None and first == 1:
            raise ValueError(
                "At an infinite noise level nothing of the image remains. Leave image out, or start lower."
            )
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
        """Set the levels of the call in its scheduler, which checks them.

        `num_inference_steps`, `sigmas` and `timesteps` are those of `flow_times`; `how` is ignored.
        """
        times = self.flow_times(num_inference_steps, sigmas, timesteps)
        self.scheduler.set_timesteps(sigmas=times, device=self._execution_device)
        self.scheduler.set_begin_index(0)

    @property
    def noise_levels(self) -> list[float]:
        """The noise levels t / (1 - t), see `ImagePipeline`. The scheduler's `sigmas` are flow times."""
        times = self.scheduler.sigmas
        return (times / (1 - times)).cpu().tolist()

    def begun(self, noise: torch.Tensor) -> torch.Tensor:
        """Scale unit `noise` (B, C, H, W) to its share at the first flow time, see `ImagePipeline`."""
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
        """Call the network once, and move the sample to the next flow time by the average velocity.

        Args:
            sample: the current sample (B, C, H, W), float32.
            index: the index of the network call in `scheduler.timesteps`.
            timestep: the entry at `index`.
            sigma: the noise level at `index`.
            told: the conditioning of the network, with or without guidance.
            **noise: ignored, because sampling is deterministic.

        Returns:
            The next sample twice, because there is no estimate of the clean sample.
        """
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
        """Find the noise from which the model generates `images`, along the ODE dx/dt = u(x, t, t).

        Heun's method leads from flow time 0 to 1, with two network calls per step. The velocity is the network's
        output with both times equal. `pipe(latents=pipe.invert(images, labels), class_labels=labels)` reconstructs the
        images, up to the model's error.

        Args:
            images: one image or several, in the form of `image` of a call.
            class_labels: one label for all or one per image, or class names. A class-conditional model requires them.
            num_inference_steps: number of steps of equal length in flow time.
            condition: further conditioning of the network, tensors (B, ...) by the names of its arguments.

        Returns:
            Noise of unit normal scale, float32 (B, C, H, W), for the `latents` of a call.

        Raises:
            ValueError: images are invalid, labels are missing or unknown, or the number of steps is below 1.
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
