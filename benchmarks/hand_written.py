"""A training step of ECT or of diffusion in plain torch, beside which gpu.py measures that of the library."""

import torch
from common import precision
from torch import Tensor, nn


class HandWritten:
    """Takes a step for each call. Data and numbers are made on the device, and nothing is waited for.

    Args:
        network: EDM's network, with ten classes.
        side: of its images.
        method: "ect", in its first stage, or "diffusion" with the same loss.
        batch: number of images.
        kind: see `precision`.
        compiled: compile the network.
    """

    def __init__(self, network: nn.Module, side: int, method: str, batch: int, kind: str, compiled: bool):
        self.device = next(network.parameters()).device
        self.network, self.model = network, torch.compile(network) if compiled else network
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-4, fused=True)
        self.weights = [weight.detach() for weight in self.network.parameters()]
        self.average = [weight.clone() for weight in self.weights]
        self.images = torch.randint(0, 256, (256, 3, side, side), dtype=torch.uint8, device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=kind == "fp16")
        self.batch, self.kind, self.consistency = batch, kind, method == "ect"

    def denoise(self, x0: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """EDM's denoiser at x0 + sigma noise."""
        s, norm = sigma[:, None, None, None], (sigma**2 + 0.25).sqrt()[:, None, None, None]
        x = x0 + s * noise
        output = self.model(x / norm, 250 * sigma.clamp(min=1e-20).log(), class_labels=classes).sample
        return 0.25 / norm**2 * x + 0.5 * s / norm * output.float()

    def __call__(self) -> None:
        rows = torch.randint(len(self.images), (self.batch,), device=self.device)
        x0 = self.images[rows].float() / 127.5 - 1
        t = (-1.1 + 2 * torch.randn(self.batch, device=self.device)).exp()
        r, noise = t * (1 - ((1 + 8 * torch.sigmoid(-t)) / 2).clamp(max=1)), torch.randn_like(x0)
        with precision(self.kind):
            estimate, target = self.denoise(x0, noise, t, rows % 10), x0
            if self.consistency:
                with torch.no_grad():
                    target = self.denoise(x0, noise, r, rows % 10)
                target = torch.where(r[:, None, None, None] > 0, target, x0)
        loss = ((estimate - target).flatten(1).norm(dim=1) / (t - r)).mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, self.weights, 1e-4)
