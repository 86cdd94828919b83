"""All metrics of a set of samples, by the names that metrics.json has."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from cm_diffusers.core.draws import permutation
from cm_diffusers.evaluation.frechet import check_count, frechet_distance
from cm_diffusers.evaluation.kernel import kernel_distance
from cm_diffusers.evaluation.manifold import neighbour_metrics
from cm_diffusers.evaluation.reference import Reference


FID_SAMPLES = 50_000  # what is called FID is by the Inception of FID and by at least so many samples


def measure(
    made: Tensor,
    reference: Reference,
    seed: int = 0,
    clock: Callable[[str], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """`frechet_distance` and, where it may be called so, `fid`; `kernel_distance` and its `kernel_distance_std`;
    `precision`, `recall`, `density`, `coverage`.

    Kernel distances are of subsets of 1,000, or of half of the samples where there are less than 2,000. Neighbours
    (the last four) are looked for among equal numbers of both sides, a fixed choice of the larger.

    Args:
        made: features (N, d) of the samples, on any device: the metrics are computed there.
        reference: of the same extractor.
        seed: of the subsets of the kernel distance.
        clock: entered around the Fréchet distance with its name.

    Raises:
        ValueError: features of another extractor, not finite, or of too few images for a covariance.
    """
    check_samples(len(made), reference)
    made = made.cpu() if made.device.type == "mps" else made  # it has no float64
    real = reference.features.to(made.device)
    with clock("frechet_distance"):
        distance = frechet_distance(made, reference.moments.to(made.device))
    smaller = min(len(made), len(real))
    kernel, deviation = kernel_distance(made, real, subset_size=min(1000, smaller // 2), seed=seed)
    few = [f[permutation(len(f), "neighbours")[:smaller].to(f.device)] for f in (real, made)]
    precision, recall, density, coverage = neighbour_metrics(*few)
    named = {"fid": distance} if reference.facts["extractor"] == "inception" and len(made) >= FID_SAMPLES else {}
    return {
        "frechet_distance": distance,
        **named,
        "kernel_distance": kernel,
        "kernel_distance_std": deviation,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def check_samples(count: int, reference: Reference) -> None:
    """Raise ValueError if `count` samples, or the reference's, are too few: to be asked before sampling."""
    check_count(min(count, reference.moments.count), len(reference.moments.mean))
