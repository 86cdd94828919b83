"""The description of a run's dataset, which is saved with its checkpoints, settings and model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from cm_diffusers.engine.config import DataArguments


LISTED_NAMES = 12


@dataclass(frozen=True)
class DataDescription:
    """Number, order, classes and shape of the images of a dataset.

    Args:
        number: number of images; None for a stream, whose rows are not counted.
        channels: 1 for grey and 3 for RGB images; the autoencoder's latent channels for latents.
        size: (height, width) in pixels or latents.
        num_classes: labels are integers in [0, num_classes); None for a dataset without labels.
        classes: class names by label in rising order, without labels that no image has; None without labels.
        fingerprint: digest of the contents, labels and captions of all images in their order; None for a stream.
    """

    number: int | None
    channels: int
    size: tuple[int, int]
    num_classes: int | None = None
    classes: Mapping[int, str] | None = None
    fingerprint: str | None = None

    @property
    def empty_classes(self) -> list[int]:
        """The labels that no image has."""
        return [label for label in range(self.num_classes or 0) if label not in self.classes]

    @property
    def shape(self) -> tuple[int, tuple[int, int], int | None]:
        """What the network depends on: channels, (height, width), and number of classes."""
        return self.channels, tuple(self.size), self.num_classes

    def __str__(self) -> str:
        """Describe the dataset in a line, for example: 1797 images of 1 x 8 x 8, 10 classes: "0", "1", "2", ..."""
        number = "a stream" if self.number is None else f"{self.number}"
        text = f"{number} of images" if self.number is None else f"{number} image{'s' * (self.number != 1)}"
        text += f" of {self.channels} x {self.size[0]} x {self.size[1]}"
        if self.num_classes is not None:
            names = [json.dumps(name, ensure_ascii=False) for name in self.classes.values()]
            more = ", ..." * (len(names) > LISTED_NAMES)
            text += f", {self.num_classes} classes: {', '.join(names[:LISTED_NAMES])}{more}"
        return text

    def differences(self, now: "DataDescription") -> list[str]:
        """Return a phrase with both values for each fact that differs in `now`.

        A fact that is None on either side, such as the number of a stream, is not compared.
        """
        facts = {
            "the number of images": (self.number, now.number),
            "channels": (self.channels, now.channels),
            "size": (" x ".join(map(str, self.size)), " x ".join(map(str, now.size))),
            "the number of classes": (self.num_classes, now.num_classes),
        }
        if self.classes is not None and now.classes is not None:
            for label in sorted({*self.classes, *now.classes}):
                facts[f"class {label}"] = (
                    repr(self.classes.get(label, "none")),
                    repr(now.classes.get(label, "none")),
                )
        if self.fingerprint is not None and now.fingerprint is not None:
            facts["the fingerprint of images (or latents) and labels"] = (self.fingerprint[:12], now.fingerprint[:12])
        found = [f"{k} was {a}, is {b}" for k, (a, b) in facts.items() if a != b and a is not None and b is not None]
        return found if len(found) <= LISTED_NAMES else [*found[: LISTED_NAMES - 1], "...", found[-1]]

    def to_json(self) -> str:
        """Return the text of `data.json`."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values. Labels become strings."""
        classes = None if self.classes is None else {str(label): name for label, name in self.classes.items()}
        return {**asdict(self), "size": list(self.size), "classes": classes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataDescription":
        """Return the description whose `to_dict` gave `values`.

        Raises:
            KeyError, TypeError, ValueError: `values` has other keys or types.
        """
        classes = values["classes"]
        if classes is not None:
            classes = {int(label): name for label, name in classes.items()}
        return cls(**{**values, "size": tuple(values["size"]), "classes": classes})


@dataclass(frozen=True)
class DescribedData:
    """A stand-in for `ImageData` where a network is built and the images are not needed.

    Args:
        description: describes the images, or their latents.
        args: the settings of the images.
        vae: the autoencoder of latents; None for pixels.
    """

    description: DataDescription
    args: DataArguments
    vae: nn.Module | None = None

    @property
    def channels(self) -> int:
        """Channels of the images or latents."""
        return self.description.channels

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) of the images or latents."""
        return self.description.size

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels."""
        return self.description.num_classes

    def measure_sigma_data(self) -> float:
        """Refuse to measure sigma_data, because there are no images.

        Raises:
            ValueError: always.
        """
        raise ValueError("The settings hold no sigma_data, and there are no images to measure it on. Set sigma_data.")
