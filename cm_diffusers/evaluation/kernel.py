"""The kernel distance of two sets of features, KID (Bińkowski et al. 2018, arXiv:1801.01401, section 4)."""

import torch
from torch import Tensor

from cm_diffusers.evaluation.checks import checked


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the squared MMD with the kernel (x·y / d + 1)^3.

    The estimate is unbiased for any number of samples: about 0 for equal distributions, and then negative half of the
    time. The standard deviation is that of one subset, as usually published. The mean over subsets of N images has a
    smaller one, by a factor of about (subset_size / N)^(1/2).

    Args:
        a, b: features (N, d) and (M, d); float64 inside.
        subsets: number of subsets.
        subset_size: samples from each set in a subset, drawn without replacement.
        seed: determines the subsets.

    Raises:
        ValueError: other shapes, non-finite features, no subsets, or a set smaller than a subset.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be >= 1 and subset_size >= 2; got {subsets} and {subset_size}.")
    a, b = checked(a, b)
    if min(len(a), len(b)) < subset_size:
        raise ValueError(f"subset_size {subset_size} is larger than the smaller set, {min(len(a), len(b))} samples.")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:subset_size].to(f.device)] for f in (a, b))
        values.append(_squared_mmd(x, y))
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the squared MMD (Gretton et al. 2012, eq. 3) of x and y, both (n, d)."""
    n, d = x.shape
    one = torch.ones((), dtype=x.dtype, device=x.device)
    xx, yy, xy = (torch.addmm(one, p, q.T, alpha=1 / d).pow_(3) for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * xy.mean()
