"""A small classifier whose features judge samples when no standard extractor is available.

Distances in its features compare runs on the same data with the same classifier. They are not FID.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cm_diffusers.core.draws import derive_seed, permutation


class SmallClassifier(nn.Module):
    """Two convolutions, 32 features, one linear layer.

    Args:
        channels: number of image channels.
        size: (height, width) of the images.
        num_classes: number of classes.
    """

    def __init__(self, channels: int, size: tuple[int, int], num_classes: int):
        super().__init__()
        height, width = (-(-side // 4) for side in size)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * height * width, 32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) for `images` (B, C, H, W) in [0, 1]."""
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 1000) -> Tensor:
        """Features (B, 32) of `images` (B, C, H, W) in [0, 1], computed `batch_size` images at a time."""
        return torch.cat([self.body(part) for part in images.split(batch_size)])


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0, epochs: int = 20) -> SmallClassifier:
    """Train a classifier; the same data and seed give the same classifier.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: classes, int64 (N,), from 0 on.
        seed: determines the initial weights and the order of the images.
        epochs: number of passes over the images, in batches of 64.
    """
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "classifier"))
        classifier = SmallClassifier(images.shape[1], tuple(images.shape[2:]), int(labels.max()) + 1)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for rows in permutation(len(images), seed, "classifier", epoch).split(64):
            loss = F.cross_entropy(classifier(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()
