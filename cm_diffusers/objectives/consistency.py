"""Shared parts of the consistency methods: the comparison of two points of a trajectory, and the pipeline."""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.core.distances import l2, pseudo_huber
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.frozen import copied
from cm_diffusers.core.solvers import euler_step, heun_step
from cm_diffusers.core.weightings import karras_weight, snr_weight
from cm_diffusers.objectives.options import option
from cm_diffusers.objectives.spec import ModelSpec
from cm_diffusers.pipelines import ConsistencyPipeline, TrigFlowPipeline
from cm_diffusers.schedulers import MultistepConsistencyScheduler, TrigFlowScheduler


SOLVERS = {"heun": heun_step, "euler": euler_step, "ddim": euler_step}  # in sigma, DDIM's step is Euler's
DISTANCES = ["pseudo_huber", "l2", "lpips"]
CM_WEIGHTS = ["uniform", "snr", "karras"]


def distance_option(default: str, more: str = "") -> Any:
    """The setting for the distance between estimate and target, one of `DISTANCES`.

    Args:
        default: its default.
        more: a further sentence of its help text, after a space.
    """
    return option(
        default,
        f"Distance between the network's estimate and the target.{more}",
        choices=DISTANCES,
        images_only="it compares images; use pseudo_huber or l2",
        images_only_choices=("lpips",),
    )


def check_distance(name: str) -> None:
    """Check that the package of the distance `name` is installed.

    Raises:
        ValueError: `name` is "lpips", and its package is missing.
    """
    if name == "lpips" and find_spec("lpips") is None:
        raise ValueError(
            "distance lpips needs another package: pip install 'cm_diffusers[lpips]' (with torchvision). It downloads"
            " an ImageNet classifier, whose features flatter FID (Song & Dhariwal 2023, section 3.3). Or use"
            " pseudo_huber, which replaced lpips."
        )


@cache
def _lpips_network(device: torch.device) -> nn.Module:
    from lpips import LPIPS

    return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)


def lpips(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS with VGG (Zhang et al. 2018, arXiv:1801.03924): (B,).

    Args:
        a, b: images (B, C, H, W) in [-1, 1], with C = 1 or 3. Those with H below 224 are resized to 224 x 224.
    """
    if a.shape[-2] < 224:
        a, b = (F.interpolate(x, 224, mode="bilinear") for x in (a, b))
    a, b = (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (a, b))
    return _lpips_network(a.device)(a, b).flatten()


def distance(name: str, a: Tensor, b: Tensor, huber_c: float) -> Tensor:
    """The distance `name` of each sample of `a` and `b` (B, ...): (B,). `huber_c` is c of "pseudo_huber"."""
    if name == "lpips":
        return lpips(a, b)
    return l2(a, b) if name == "l2" else pseudo_huber(a, b, huber_c)


def cm_weight(name: str, sigma: Tensor, sigma_data: float) -> Tensor:
    """A weight (B,) of the original consistency models at `sigma` (B,).

    Args:
        name: "uniform" is 1, "snr" is 1 / sigma^2, and "karras" is 1 / sigma^2 + 1 / sigma_data^2.
        sigma: the noise levels.
        sigma_data: root mean square of the data.
    """
    if name == "uniform":
        return torch.ones_like(sigma)
    return snr_weight(sigma) if name == "snr" else karras_weight(sigma, sigma_data)


def moving_target(network: nn.Module) -> nn.Module:
    """A copy of `network` without gradients, which `move_towards` updates. Both networks share frozen weights.

    It is in training mode, so that both networks apply the same dropout.
    """
    return copied(network).requires_grad_(False).train()


@torch.no_grad()
def move_towards(target: nn.Module, network: nn.Module, decay: float) -> None:
    """Update the weights of `target`: target <- `decay` target + (1 - `decay`) `network`."""
    pairs = [(a, b) for a, b in zip(target.parameters(), network.parameters()) if b.requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)


def estimate_and_target(
    *,
    student: Denoiser,
    x_t: Tensor,
    t: Tensor,
    target: Denoiser,
    x_u: Tensor,
    u: Tensor,
    condition: Condition,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """D(x_t, t), and D-(x_u, u) without gradient, with the same dropout masks.

    Args:
        student: D.
        x_t: the points (B, ...) at `t`.
        t: their noise levels (B,).
        target: D-.
        x_u: the points (B, ...) at `u`.
        u: their noise levels (B,).
        condition: B rows.
        draws: the random numbers of the step.
    """
    with draws.dropout():
        estimate = student(x_t, t, condition)
    with torch.no_grad(), draws.dropout():
        return estimate, target(x_u, u, condition)


@torch.no_grad()
def teacher_step(
    teacher: Callable[[Tensor, Tensor, Condition], Tensor],
    x: Tensor,
    *,
    t: Tensor,
    u: Tensor,
    condition: Condition,
    solver: str,
) -> Tensor:
    """The end at `u` < `t`, both (B,), of one step along the teacher's ODE from `x` (B, ...) at `t`.

    Args:
        teacher: D(x, sigma, condition).
        x: the points.
        t: their noise levels.
        u: the noise levels after the step.
        condition: B rows.
        solver: a key of `SOLVERS`.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return teacher(x, sigma, condition)

    return SOLVERS[solver](denoise, x, t, u)


def consistency_pipeline(
    network: nn.Module, spec: ModelSpec, sigma_min: float, num_train_timesteps: int, rho: float = 7.0
) -> DiffusionPipeline:
    """The pipeline that samples a consistency model at the levels of a Karras grid.

    It has stock classes wherever they can express the model, so that it loads with diffusers alone.

    Args:
        network: the trained network.
        spec: its parameterisation.
        sigma_min: the lowest level of the grid.
        num_train_timesteps: number of levels in the grid.
        rho: exponent of the grid.
    """
    config = {"sigma_min": sigma_min, "sigma_max": spec.sigma_max, "sigma_data": spec.sigma_data}
    config |= {"num_train_timesteps": num_train_timesteps, "rho": rho}
    settings: Any = network.config
    if spec.time_label == "log_sigma" and isinstance(settings.sample_size, int):
        return ConsistencyModelPipeline(network, CMStochasticIterativeScheduler(**config))
    return ConsistencyPipeline(network, MultistepConsistencyScheduler(**config, **spec.input_config))


def trigflow_pipeline(network: nn.Module, spec: ModelSpec) -> DiffusionPipeline:
    """The pipeline that samples a TrigFlow consistency model, or a flow model trained as one.

    Args:
        network: the trained network.
        spec: its parameterisation, with the prediction "trigflow" or "flow".
    """
    if spec.prediction == "flow":
        return consistency_pipeline(network, spec, 0.0, num_train_timesteps=41, rho=middle_rho(spec))
    scheduler = TrigFlowScheduler(sigma_data=spec.sigma_data, sigma_max=spec.sigma_max)
    return TrigFlowPipeline(network, scheduler)


def middle_rho(spec: ModelSpec) -> float:
    """The exponent that puts the middle of a Karras grid down to 0 at 1.6 sigma_data, for a model with `spec`.

    The second of two sampling steps starts there: at 0.8 for data of scale 0.5.
    """
    return math.log2(spec.sigma_max / (1.6 * spec.sigma_data))
