"""Diagnostics of a model in place of the loss, because a consistency loss does not measure quality."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.conditions import NOTHING, Condition
from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.solvers import heun_step, ode_slope
from cm_diffusers.core.tangents import jvp, jvp_ready
from cm_diffusers.engine.files import written_aside


LEVELS = 16  # noise levels in the picture
TEACHER_LEVELS = 18  # noise levels of the teacher's ODE
ANGLES = (0.3, 0.7, 1.1, 1.4)  # radians at which tangents are drawn


def _at(denoiser: Denoiser, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma, condition)

    return denoise


@torch.no_grad()
def ode_endpoint(teacher: Denoiser, x: Tensor, sigma_max: float, condition: Condition = NOTHING) -> Tensor:
    """The endpoint at sigma 0 of the teacher's ODE, by Heun steps over 18 Karras levels.

    Args:
        teacher: the denoiser of a diffusion model.
        x: the start of the ODE (B, C, H, W) at `sigma_max`.
        sigma_max: the highest noise level.
        condition: the conditioning of the teacher.
    """
    sigmas = [*karras_sigmas(TEACHER_LEVELS, 0.002, sigma_max).tolist(), 0.0]
    for now, then in zip(sigmas, sigmas[1:]):
        x = heun_step(_at(teacher, condition), x, x.new_full((len(x),), now), x.new_full((len(x),), then))
    return x


def consistency_error(
    denoiser: Denoiser, endpoint: Tensor, x: Tensor, sigma_max: float, condition: Condition = NOTHING
) -> float:
    """Root mean square difference between the one-step sample and the teacher's endpoint, in units of [-1, 1] images.

    Args:
        denoiser: the denoiser of a consistency model.
        endpoint: the result of `ode_endpoint` (B, C, H, W).
        x: the noise (B, C, H, W) at `sigma_max` from which both start.
        sigma_max: the highest noise level.
        condition: the conditioning of the model.
    """
    with torch.no_grad():
        guess = denoiser(x, x.new_full((len(x),), sigma_max), condition)
    return (guess - endpoint).square().mean().sqrt().item()


def tangents(
    denoiser: Denoiser,
    network: nn.Module,
    x0: Tensor,
    noise: Tensor,
    angle: float,
    condition: Condition = NOTHING,
    teacher: Denoiser | None = None,
) -> tuple[Tensor, Tensor]:
    """Tangents df/dt with the angle t = atan(sigma / sigma_data): exact, and as a finite difference.

    The derivative is taken along the teacher's ODE, or without a teacher along the straight line from `x0`.

    Args:
        denoiser: the denoiser f of the model.
        network: the network of the model, which is prepared for forward-mode derivatives.
        x0: images (B, C, H, W) in [-1, 1].
        noise: unit normal (B, C, H, W).
        angle: t in radians, in (0, pi / 2).
        condition: the conditioning of the images.
        teacher: the denoiser of a diffusion model, or None.

    Returns:
        The exact tangent and the finite difference, (B, C, H, W) each.
    """
    t = x0.new_full((len(x0),), angle)
    sigma, speed = denoiser.sigma_data * t.tan(), denoiser.sigma_data / t.cos() ** 2
    x = x0 + append_dims(sigma, x0) * noise
    with torch.no_grad():
        slope = noise if teacher is None else ode_slope(_at(teacher, condition), x, sigma)
    arguments = _at(denoiser, condition), (x, sigma), (append_dims(speed, slope) * slope, speed)
    with jvp_ready(network):
        exact = jvp(*arguments, mode="exact")[1]
    return exact, jvp(*arguments, mode="finite_difference", relative_step=1e-3)[1]


def save_diagnostics(
    denoiser: Denoiser,
    images: Tensor,
    condition: Condition,
    path: Path,
    teacher: Denoiser | None = None,
    sigma_max: float = 80.0,
    network: nn.Module | None = None,
) -> dict[str, float]:
    """Draw diagnostics of a model, and return the numbers in the picture.

    The rows of the picture are:

    - one image with the same noise at 16 noise levels, and its denoised versions;
    - with a teacher: the endpoints of its ODE, and one-step samples of the model from the same noise;
    - with the network: exact tangents and finite differences at four angles, as heat maps.

    Args:
        denoiser: the denoiser of the model.
        images: real images (B, C, H, W) in [-1, 1]; eight are enough.
        condition: the conditioning of the images.
        path: the image file to write.
        teacher: the denoiser of a diffusion model, or None.
        sigma_max: the highest noise level.
        network: the network of the model for the tangents, or None.

    Returns:
        "consistency_error" with a teacher (see that function), and "tangent_difference" with the network: the relative
        L2 difference of the exact tangents and the finite differences.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator).to(images)
    sigmas = karras_sigmas(LEVELS, 0.02, sigma_max).to(images)
    noisy = images[:1] + append_dims(sigmas, images) * noise[:1]
    with torch.no_grad():
        restored = denoiser(noisy, sigmas, condition.rows([0] * LEVELS))
    scale = append_dims((sigmas**2 + denoiser.sigma_data**2).sqrt() / denoiser.sigma_data, noisy)
    rows = [("noisy, sigma:\n", noisy / scale), ("denoised", restored)]
    if teacher is not None:
        start = sigma_max * noise
        end = ode_endpoint(teacher, start, sigma_max, condition)
        numbers["consistency_error"] = consistency_error(denoiser, end, start, sigma_max, condition)
        with torch.no_grad():
            guess = denoiser(start, start.new_full((len(start),), sigma_max), condition)
        rows += [("teacher's ODE", end), (f"one step (rms {numbers['consistency_error']:.3f})", guess)]
    maps = {} if network is None else _tangent_maps(denoiser, network, images, noise, condition, teacher, numbers)

    figure = Figure(figsize=(LEVELS * 0.8, (len(rows) + len(maps)) * 0.95), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows) + len(maps), LEVELS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, sigma in zip(axes[0], sigmas.tolist()):
        axis.set_title(f"{sigma:.2g}", fontsize=8)
    for line, (title, pictures) in zip(axes, rows):
        line[0].set_title(title, loc="left", fontsize=8).set_in_layout(False)  # it may be wider than its picture
        for axis, picture in zip(line, pictures.cpu().clamp(-1, 1) / 2 + 0.5):
            axis.imshow(picture.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
    for axis, angle in zip(axes[len(rows), :: LEVELS // len(ANGLES)] if maps else (), ANGLES):
        axis.set_title(f"t = {angle}", fontsize=8)
    for line, (title, pictures) in zip(axes[len(rows) :], maps.items()):
        line[0].set_title(title, loc="left", fontsize=8).set_in_layout(False)  # it may be wider than its picture
        reach = pictures.abs().quantile(0.99).item()
        for axis, picture in zip(line, pictures.cpu().mean(1)):
            axis.imshow(picture.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=80)
    return numbers


def _tangent_maps(denoiser, network, images, noise, condition, teacher, numbers) -> dict[str, Tensor]:
    """Exact tangents and finite differences of the first images at each angle, by the titles of their rows."""
    some = slice(0, LEVELS // len(ANGLES))
    condition = condition.rows(some)
    pairs = [tangents(denoiser, network, images[some], noise[some], angle, condition, teacher) for angle in ANGLES]
    exact, difference = (torch.cat(parts) for parts in zip(*pairs))
    numbers["tangent_difference"] = ((exact - difference).norm() / exact.norm()).item()
    return {"df/dt\n": exact, "by differences": difference}
