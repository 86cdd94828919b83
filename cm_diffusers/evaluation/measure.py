"""All metrics of a set of samples, under their names in metrics.json."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from cm_diffusers.core.draws import permutation
from cm_diffusers.evaluation.frechet import check_count, frechet_distance
from cm_diffusers.evaluation.kernel import kernel_distance
from cm_diffusers.evaluation.manifold import neighbour_metrics
from cm_diffusers.evaluation.reference import Reference


FID_SAMPLES = 50_000  # results are called FID only with FID's Inception and at least this many samples


def measure(
    made: Tensor,
    reference: Reference,
    seed: int = 0,
    clock: Callable[[str], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Compute all metrics of samples against a reference.

    | key | metric |
    |---|---|
    | `frechet_distance` | Fréchet distance |
    | `fid` | the same number, only with FID's Inception and at least `FID_SAMPLES` samples |
    | `kernel_distance`, `kernel_distance_std` | kernel distance and its deviation, from subsets of 1,000 samples |
    | `precision`, `recall`, `density`, `coverage` | neighbour metrics, from equal numbers of both sets |

    With fewer than 2,000 samples, subsets have half of them. For the neighbour metrics, a fixed choice is taken from
    the larger set.

    Args:
        made: features (N, d) of the samples, on any device. The metrics are computed there.
        reference: features of real images by the same extractor.
        seed: determines the subsets of the kernel distance.
        clock: makes a context manager that is entered around the Fréchet distance, from the name of the metric.

    Raises:
        ValueError: features of another size, not finite, or of too few images for a covariance.
    """
    check_samples(len(made), reference)
    made = made.cpu() if made.device.type == "mps" else made  # mps has no float64
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
    """Check, before sampling, that `count` samples and those of the `reference` suffice for a covariance.

    Raises:
        ValueError: either number is at most the number of features.
    """
    check_count(min(count, reference.moments.count), len(reference.moments.mean))
