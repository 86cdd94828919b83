"""What the data of a run are: the description that travels with its checkpoints, settings and saved model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataDescription:
    """Number, order, classes and shape of the images of a dataset.

    Args:
        number: how many images there are; None for a stream, which nobody has counted.
        channels: of the images, 1 for grey and 3 for RGB (of latents the autoencoder's).
        size: (height, width) in pixels, or in latents.
        num_classes: labels are integers in [0, num_classes); None for a dataset without labels.
        classes: the name of each label that an image has, by label, in rising order; None without labels. Labels that
            no image has are missing here.
        fingerprint: a digest of the contents and labels of all images in their order; None for a stream.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: labels become strings."""
        classes = None if self.classes is None else {str(label): name for label, name in self.classes.items()}
        return {**asdict(self), "size": list(self.size), "classes": classes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataDescription":
        """From what `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        classes = values["classes"]
        if classes is not None:
            classes = {int(label): name for label, name in classes.items()}
        return cls(**{**values, "size": tuple(values["size"]), "classes": classes})
