"""Images as latents of an autoencoder, which are computed once before training and cached in a file on request."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from cm_diffusers.core.draws import permutation
from cm_diffusers.engine.data.images import SIGMA_DATA_SAMPLES, ImageData
from cm_diffusers.engine.files import replace_file
from cm_diffusers.engine.processes import ALONE, Team
from cm_diffusers.objectives.options import check_for_latents


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """Encode `images` (B, C, H, W) in [-1, 1] as latents (B, c, h, w), float32.

    The latents are shifted and scaled by the config of the autoencoder `vae`. A posterior gives its mode, a function
    of the image alone, so latents can be cached and a run repeats itself on any number of processes. The spread of the
    posterior is far below that of the latents.
    """
    output = vae.encode(images.to(vae.dtype))
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
    config = vae.config
    return (latents.float() - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)


class LatentData(ImageData):
    """A dataset of latents, in the interface of `ImageData`: `images` are float32 (N, c, h, w).

    Args:
        data: the images.
        vae: a diffusers autoencoder.
        cache: file for the latents. They are read from it if it is intact and was made from these images, this
            autoencoder and these settings. Otherwise it is written.
        device: device that encodes.
        say: prints a line.
        batch_size: number of images encoded at once.
        team: the processes that share the work.

    Raises:
        ValueError: a stream, an option that latents exclude (such as --random_flip), or images with other channels
            than the autoencoder takes.
    """

    def __init__(
        self,
        data: ImageData,
        vae: nn.Module,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = print,
        batch_size: int = 64,
        team: Team = ALONE,
    ):
        check_for_latents(data.args)
        if data.channels != vae.config.in_channels:
            raise ValueError(
                f"the autoencoder takes images of {vae.config.in_channels} channels,"
                f" the dataset gives {data.channels}: set --channels {vae.config.in_channels}."
            )
        self.args, self.labels, self.num_classes = data.args, data.labels, data.num_classes
        self._classes, self._mixture, self._buckets = data._classes, data._mixture, None
        self.vae = vae.float().eval().requires_grad_(False).to(device)
        self.show_progress = data.show_progress
        self._fingerprint = key = _key(data, vae)
        latents = None if cache is None else _read(cache, key, say if team.rank == 0 else lambda line: None)
        if not all(team.gather(latents is not None)):
            latents = self._encode(data, device, batch_size, team)
            if cache is not None and team.rank == 0:
                cache.parent.mkdir(parents=True, exist_ok=True)
                replace_file(cache, save({"latents": latents}, {"key": key, "sha256": _digest(latents)}))
        self.images, self.channels, self.resolution = latents, latents.shape[1], tuple(latents.shape[2:])

    def _encode(self, data: ImageData, device: torch.device | str, batch_size: int, team: Team) -> Tensor:
        """Encode the images, in the batches of one process."""
        own, parts = team.part(len(data.images), batch_size), [torch.empty(0)]
        bar = range(own.start, own.stop, batch_size)
        for start in tqdm(bar, desc="Encoding images", disable=not self.show_progress, leave=False):
            images = data.rows(list(range(start, min(start + batch_size, own.stop))))
            parts.append(encode(self.vae, images.to(device).float() / 127.5 - 1).cpu())
        latents = torch.cat(parts[1:] or parts)
        return team.join(latents.contiguous())  # encoders can return channels-last tensors

    def measure_sigma_data(self) -> float:
        """Return the root mean square of the latents, estimated on at most 10,000 of them."""
        rows = permutation(len(self.images), "sigma_data")[:SIGMA_DATA_SAMPLES]
        return round(self.images[rows].double().square().mean().sqrt().item(), 4)


def _key(data: ImageData, vae: nn.Module) -> str:
    """The SHA-256 of everything that determines the latents: images, shape, weights and config of the autoencoder."""
    made_by = {"images": data.description.fingerprint, "shape": [len(data.images), data.channels, *data.resolution]}
    made_by["vae"] = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {_digest(value)}".encode())
    return digest.hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def _read(cache: Path, key: str, say: Callable[[str], None]) -> Tensor | None:
    """The latents in `cache`; None if the file is missing, damaged, or was made from other data."""
    if not cache.exists():
        return None
    try:
        with safe_open(cache, "pt") as file:
            found, latents = file.metadata(), file.get_tensor("latents")
        if found["sha256"] != _digest(latents):
            raise ValueError("its SHA-256 differs")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        say(f"WARNING: {cache} is damaged ({error}); the images are encoded again.")
        return None
    if found["key"] != key:
        say(f"{cache} holds latents of other images or of another autoencoder; the images are encoded again.")
        return None
    return latents
