import torch


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean, covariance, n=100, seed=0):
    """Features (n, d) whose sample mean and covariance equal the given ones up to rounding."""
    raw = normals(n, len(mean), seed=seed)
    raw -= raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    factor = torch.linalg.cholesky(torch.as_tensor(covariance, dtype=torch.float64))
    return white @ factor.T + torch.tensor(mean, dtype=torch.float64)
