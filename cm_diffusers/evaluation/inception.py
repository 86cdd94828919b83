"""The Inception v3 of FID, with the layer names of its published weights.

The network is that of Szegedy et al. 2015 (arXiv:1512.00567), in the variant of the file of 2015-12-05, which defines
FID (Heusel et al. 2017). In this variant, average pooling leaves out the padding, and the last block pools by the
maximum. The weights are published under two names, `pt_inception-2015-12-05-6726825d.pth` and
`weights-inception-2015-12-05-6726825d.pth`.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cm_diffusers.convert.reading import read_checkpoint
from cm_diffusers.evaluation.checks import as_rgb


URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # start of the file's digest

# a block has parallel branches; a branch is a chain of convolutions (channels, kernel), the last of which can fork
ROW, COLUMN = (1, 7), (7, 1)
FORK = ((1, 3), (3, 1))


def _block_a(pooled: int) -> dict:
    double = [(64, 1), (96, 3), (96, 3)]
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": double,
        "branch_pool": [(pooled, 1)],
    }


def _block_c(n: int) -> dict:
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(n, 1), (n, ROW), (192, COLUMN)],
        "branch7x7dbl": [(n, 1), (n, COLUMN), (n, ROW), (n, COLUMN), (192, ROW)],
        "branch_pool": [(192, 1)],
    }


BLOCK_B = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
BLOCK_D = {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3)]}
BLOCK_E = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), (384, FORK)],
    "branch3x3dbl": [(448, 1), (384, 3), (384, FORK)],
    "branch_pool": [(192, 1)],
}
STEM = {"1a_3x3": (32, 3, 2, 0), "2a_3x3": (32, 3, 1, 0), "2b_3x3": (64, 3, 1, 1), "3b_1x1": (80, 1, 1, 0)}
STEM |= {"4a_3x3": (192, 3, 1, 0)}
MIXED = {"5b": _block_a(32), "5c": _block_a(64), "5d": _block_a(64), "6a": BLOCK_B}
MIXED |= {"6b": _block_c(128), "6c": _block_c(160), "6d": _block_c(160), "6e": _block_c(192)}
MIXED |= {"7a": BLOCK_D, "7b": BLOCK_E, "7c": BLOCK_E}


class _Convolution(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int | tuple, stride: int, padding: int | tuple):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Parallel branches, one of which pools; if that branch has no convolution, the block halves the size."""

    def __init__(self, channels: int, branches: dict, last: bool):
        super().__init__()
        self.halves, self.last = "branch_pool" not in branches, last
        self.chains, self.out = {}, channels if self.halves else 0
        for name, chain in branches.items():
            width, self.chains[name] = channels, []
            for i, (out, kernel) in enumerate(chain, 1):
                number = f"_{i}" if len(chain) > 1 else ""
                forks = kernel if kernel == FORK else (kernel,)
                halve = self.halves and i == len(chain)
                keys = [f"{name}{number}{letter}" for letter in ("ab" if len(forks) > 1 else ("",))]
                for key, size in zip(keys, forks):
                    padding = 0 if halve else tuple(s // 2 for s in (size if isinstance(size, tuple) else (size,) * 2))
                    self.add_module(key, _Convolution(width, out, size, 1 + halve, padding))
                self.chains[name].append(keys)
                width = out * len(forks)
            self.out += width

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for name, chain in self.chains.items():
            y = self._pool(x) if name == "branch_pool" else x
            for keys in chain:
                y = torch.cat([self.get_submodule(key)(y) for key in keys], 1)
            results.append(y)
        return torch.cat([*results, F.max_pool2d(x, 3, 2)] if self.halves else results, 1)

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1) if self.last else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class FIDInception(nn.Module):
    """Inception v3 from images (B, 1 or 3, H, W) in [0, 1] to the features (B, 2048) after the last pooling."""

    def __init__(self):
        super().__init__()
        channels = 3
        for name, (out, *shape) in STEM.items():
            self.add_module(f"Conv2d_{name}", _Convolution(channels, out, *shape))
            channels = out
        for name, branches in MIXED.items():
            block = _Mixed(channels, branches, last=name == "7c")
            self.add_module(f"Mixed_{name}", block)
            channels = block.out
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of `images` (B, 1 or 3, H, W) in [0, 1].

        Raises:
            ValueError: the images have neither 1 nor 3 channels.
        """
        x = (resize_as_tensorflow(as_rgb(images) * 255, 299) - 128) / 128
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = layer(x)
        return x.mean((2, 3))


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Resize `images` (B, C, H, W) to (B, C, `side`, `side`) with TensorFlow 1's bilinear interpolation.

    Pixel i is read at i * (old side / new side), without antialiasing.
    """
    down, across = (_weights(n, side).to(images) for n in images.shape[2:])
    return down @ images @ across.T


def _weights(old: int, new: int) -> Tensor:
    places = torch.arange(new, dtype=torch.float64) * (old / new)
    low = places.long()
    rows, part = torch.arange(new), places - low
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights[rows, low] = 1 - part
    weights[rows, (low + 1).clamp(max=old - 1)] += part
    return weights


def load_inception(path: Path | str | None = None) -> FIDInception:
    """Load the network with its published weights.

    The weights are read from the file `path`. By default they are read from torch's cache, and downloaded into it if
    missing.

    Raises:
        ValueError: the download fails, or the file can't be read or is not the published one.
    """
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", URL.rsplit("/", 1)[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not path.exists():
                torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the weights of the FID Inception can't be downloaded from {URL} ({error}). Fetch the file elsewhere"
                " and give its path as the extractor's weights, or use another extractor."
            ) from None
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(
            f"the weights of the FID Inception, {str(path)!r}, can't be read: {error.strerror}. Get them from {URL}."
        ) from None
    if not digest.startswith(SHA256):
        raise ValueError(
            f"{str(path)!r} is not the published file: its SHA-256 begins with {digest[:8]}, not {SHA256}. Distances"
            f" with other weights are not FID. Get the file from {URL}."
        )
    network = FIDInception()
    load_published(network, read_checkpoint(path))
    return network


def load_published(network: FIDInception, state: dict[str, Tensor]) -> None:
    """Load weights `state` (any shapes), by their published names, into `network`; the classifier `fc` is left out.

    Raises:
        ValueError: weights are missing or unknown.
    """
    counters = [key for key in network.state_dict() if key.endswith("num_batches_tracked")]
    missing, unexpected = network.load_state_dict(state, strict=False)
    unexpected = [key for key in unexpected if not key.startswith("fc.")]
    missing = [key for key in missing if key not in counters]
    if missing or unexpected:
        raise ValueError(f"the weights don't fit the FID Inception: missing {missing[:3]}, unknown {unexpected[:3]}.")
