"""Compare zero-shot editing with a known posterior: a Gaussian, with its exact consistency function.

    python benchmarks/experiments/editing_gaussian.py

Images have 1 x 8 x 8 pixels, a mean m and the covariance C = exp(-distance / 3) / 16. The network is the exact
consistency function. `ConsistencyPipeline` samples it with inpaint and super_resolve. A table has one row for each
choice of noise levels, and these columns:

- bias: distance of the samples' mean from the posterior mean, divided by that of the prior mean, both as root mean
  squares over 2,000 images of the Gaussian, by the closed form;
- variance: variance of the samples divided by that of the posterior, in the unknown part (1 is right);
- error of the closed form: largest difference of the samples' mean, and of their covariance, from the closed form of
  algorithm 4 for a Gaussian. The units are standard errors of the mean and of an entry of the covariance.

Closed form of a jump: let A = C^1/2 (C + s^2)^-1/2. Clean images with mean u and covariance V, plus noise of level s,
become images with mean m + A (u - m) and covariance A (V + s^2) A. Only the unknown part, I - P, is kept.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.core.karras import karras_sigma
from cm_diffusers.core.measurements import Projection, averages, inside


SIZE, SIGMA_MAX, SIGMA_DATA = 8, 80.0, 0.5


def drawn(count: int, seed: int) -> np.ndarray:
    """Images (count, n) of the Gaussian, clipped to [-1, 1]. A Cholesky factor makes them the same everywhere."""
    return np.random.default_rng(seed).multivariate_normal(*gaussian(), size=count, method="cholesky").clip(-1, 1)


def gaussian(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """The mean (n,) and the covariance (n, n) of images of n = size^2 pixels."""
    places = np.stack(np.meshgrid(*[np.arange(size)] * 2, indexing="ij"), -1).reshape(-1, 2)
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    return 0.3 * np.sin(places.sum(1) / 2), np.exp(-distances / 3) / 16


class GaussianModel(ModelMixin, ConfigMixin):
    """Network F under EDM's scalings that gives f(x, s) = m + C^1/2 (C + s^2)^-1/2 (x - m), exact for N(m, C)."""

    @register_to_config
    def __init__(self, sample_size: int = SIZE, in_channels: int = 1, num_class_embeds: int | None = None):
        super().__init__()
        mean, covariance = gaussian(sample_size)
        variances, axes = np.linalg.eigh(covariance)
        self.variances, self.axes, self.mean = (torch.from_numpy(array).float() for array in (variances, axes, mean))
        self.factor = torch.nn.Parameter(torch.ones(()))  # ModelMixin reads dtype and device off a parameter

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        sigma = math.exp(float(timestep) / 250)
        x = sample.flatten(1) * math.sqrt(sigma**2 + SIGMA_DATA**2)
        shrunk = (x - self.mean) @ self.axes * (self.variances / (self.variances + sigma**2)).sqrt()
        clean = self.mean + shrunk @ self.axes.T
        skip, out = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2), sigma * SIGMA_DATA / math.hypot(sigma, SIGMA_DATA)
        return ((self.factor * (clean - skip * x) / out).reshape(sample.shape),)


def pipeline(size: int = SIZE) -> ConsistencyPipeline:
    """A pipeline with the exact consistency function."""
    scheduler = MultistepConsistencyScheduler(sigma_min=0.0, sigma_max=SIGMA_MAX, clip_denoised=False)
    pipe = ConsistencyPipeline(GaussianModel(size), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def posterior(mean: np.ndarray, covariance: np.ndarray, known: np.ndarray, told: np.ndarray) -> tuple:
    """Mean and covariance of x ~ N(mean, covariance), given P x = `told`, where `known` is the matrix of P.

    `mean` and `told` are (n,), or (n, k) for k images at once.
    """
    gain = covariance @ known @ np.linalg.pinv(known @ covariance @ known)
    return mean + gain @ (told - known @ mean), covariance - gain @ known @ covariance


def algorithm(mean: np.ndarray, covariance: np.ndarray, known: np.ndarray, start: np.ndarray, sigmas: list) -> tuple:
    """Mean and covariance after algorithm 4, which begins with `start`; `known` is the matrix of P.

    `mean` and `start` are (n,), or (n, k) for k images at once.
    """
    variances, axes = np.linalg.eigh(covariance)
    free = np.eye(len(mean)) - known
    now, spread = start, np.zeros_like(covariance)
    for sigma in sigmas:
        jump = (axes * np.sqrt(variances / (variances + sigma**2))) @ axes.T
        now = free @ (mean + jump @ (now - mean)) + known @ start
        spread = free @ jump @ (spread + sigma**2 * np.eye(len(mean))) @ jump @ free
    return now, spread


def bias(edit: str, known: np.ndarray, sigmas: list, count: int = 2000) -> float:
    """The root mean square distance of the mean from the posterior mean, by that of the prior mean, over images."""
    (mean, covariance), truths = gaussian(), drawn(count, seed=1).T
    mean = np.repeat(mean[:, None], count, axis=1)
    start = known @ truths if edit.startswith("super_resolve") else truths
    wanted, _ = posterior(mean, covariance, known, known @ truths)
    now, _ = algorithm(mean, covariance, known, start, sigmas)
    return float(np.linalg.norm(now - wanted) / np.linalg.norm(wanted - known @ truths - mean + known @ mean))


def matrix(project: Projection, size: int = SIZE) -> np.ndarray:
    """The matrix (n, n) of a projection of images."""
    n = size**2
    return project(torch.eye(n, dtype=torch.float64).reshape(n, 1, size, size)).reshape(n, n).numpy().T


def karras(n: int) -> list[float]:
    """The first n of n + 1 Karras levels down to 0."""
    return karras_sigma(np.arange(n) / n, 0.0, SIGMA_MAX, 7.0).tolist()


LEVELS = {
    **{f"{n} steps, as by default": {"num_inference_steps": n} for n in (2, 5, 10, 20, 40, 100)},
    **{f"{n} steps, Karras": {"sigmas": karras(n)} for n in (2, 5, 10, 20, 40, 100, 1000)},
    "400 steps, 1 to 0.05": {"sigmas": np.geomspace(1.0, 0.05, 400).tolist()},
}


def edits(pipe: ConsistencyPipeline, truth: torch.Tensor) -> dict[str, tuple]:
    """For each edit of `truth` (1, 1, H, W) in [-1, 1] by name: the function, its projection and its start image."""
    image, mask = truth / 2 + 0.5, torch.zeros(SIZE, SIZE)
    mask[:, SIZE // 2 :] = 1
    coarse = F.avg_pool2d(image, 2)
    return {
        "inpaint the right half": (partial(pipe.inpaint, image, mask), inside(1 - mask), truth),
        "super_resolve 4 x 4": (
            partial(pipe.super_resolve, coarse),
            averages((SIZE // 2, SIZE // 2), (SIZE, SIZE)),
            2 * F.interpolate(coarse, SIZE) - 1,
        ),
    }


def show(name: str, edit: Callable, project: Projection, start: torch.Tensor, count: int, seed: int) -> None:
    """Print the table of one edit."""
    (mean, covariance), known, begin = gaussian(), matrix(project), start.double().flatten().numpy()
    _, spread = posterior(mean, covariance, known, known @ begin)
    print(f"\n{name}\n\n| levels | bias | variance | error of the closed form |\n|---|---|---|---|")
    for levels, arguments in LEVELS.items():
        pipe, generator = edit.func.__self__, torch.Generator().manual_seed(seed)
        made = edit(**arguments, batch_size=count, generator=generator, output_type="latent").images
        x = made.flatten(1).double().numpy()
        assert np.abs((x - begin) @ known).max() < 1e-5  # the samples agree with the known part
        found, found_spread = x.mean(0), np.cov(x.T)
        sigmas = pipe.scheduler.sigmas[:-1].tolist()
        foretold, around = algorithm(mean, covariance, known, begin, sigmas)
        variances = np.diag(around)
        open_ = variances > 1e-9
        of_mean = np.abs(found - foretold)[open_] / np.sqrt(variances[open_] / count)
        of_entry = np.sqrt((np.outer(variances, variances) + around**2) / count)[np.ix_(open_, open_)]
        of_spread = np.abs(found_spread - around)[np.ix_(open_, open_)] / of_entry
        of_posterior = np.trace(found_spread) / np.trace(spread)
        print(
            f"| {levels} | {bias(name, known, sigmas):.3f} | {of_posterior:.3f} | {of_mean.max():.1f},"
            f" {of_spread.max():.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="samples per row (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the image and of the samples (default: 0)")
    args = parser.parse_args()
    truth = torch.from_numpy(drawn(1, args.seed)).float().reshape(1, 1, SIZE, SIZE)
    for name, parts in edits(pipeline(), truth).items():
        show(name, *parts, args.count, args.seed)
