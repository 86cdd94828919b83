"""Images from any source of the datasets library, checked before training, in an order that only the seed decides."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from cm_diffusers.core.draws import permutation
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.pixels import to_uint8


CACHE_BYTES = 4 << 30  # decoded datasets up to this size are kept in memory
SHUFFLE_BUFFER = 2_000
SIGMA_DATA_SAMPLES = 10_000
GREY_MODES = ("1", "L", "LA", "I", "F")


def load_source(args: DataArguments) -> datasets.Dataset | datasets.IterableDataset:
    """The dataset that `args` name, images not decoded yet. Raises ValueError if it is not to be had or empty."""
    if args.dataset_name == "digits":
        source = _digits()
    else:
        name, options = args.dataset_name, {}
        if args.train_data_dir is not None:
            name, options = "imagefolder", {"data_dir": args.train_data_dir}
            if not Path(args.train_data_dir).is_dir():
                raise ValueError(f"train_data_dir {args.train_data_dir!r} is not a folder.")
        elif Path(name).suffix == ".parquet":
            name, options = "parquet", {"data_files": {args.split: args.dataset_name}}
        try:
            source = datasets.load_dataset(
                name,
                args.dataset_config_name,
                split=args.split,
                streaming=args.streaming,
                revision=args.dataset_revision,
                **options,
            )
        except Exception as error:  # the library raises many kinds; all mean that there is no dataset
            what = args.dataset_name or args.train_data_dir
            raise ValueError(f"dataset {what!r}, split {args.split!r}, can't be loaded: {error}") from error
    if args.max_train_samples is not None:
        source = source.take(args.max_train_samples)
    if not args.streaming and len(source) == 0:
        raise ValueError(f"dataset {args.dataset_name or args.train_data_dir!r} is empty.")
    return source


def _digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("dataset 'digits' needs scikit-learn: pip install 'cm-diffusers[quickstart]'") from None
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def find_image_column(features: datasets.Features, asked: str | None) -> str:
    """The column that was asked for, or the only one that holds images. Raises ValueError with the list of columns."""
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if asked is not None:
        if asked not in features:
            raise ValueError(f"image_column {asked!r} is not a column of the dataset; it has: {_described(features)}.")
        return asked
    if len(columns) != 1:
        found = "no column" if not columns else f"several columns ({', '.join(columns)})"
        raise ValueError(f"{found} of images found; give --image_column. The dataset has: {_described(features)}.")
    return columns[0]


def find_label_column(features: datasets.Features, asked: str | None) -> str:
    """The column that was asked for, or the only one of class labels, or one called `label`."""
    if asked is not None:
        if asked not in features:
            raise ValueError(f"label_column {asked!r} is not a column of the dataset; it has: {_described(features)}.")
        return asked
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = columns if len(columns) == 1 else [name for name in ("label", "labels") if name in features]
    if len(columns) != 1:
        raise ValueError(f"no column of labels found; give --label_column. The dataset has: {_described(features)}.")
    return columns[0]


def _described(features: datasets.Features) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def open_image(record: dict) -> Image.Image:
    """A PIL image from an undecoded record of the datasets library, upright, fully read."""
    image = Image.open(io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"])
    if image.format == "EPS":
        raise ValueError("PostScript is a program, which would have to be run")
    image.load()
    return ImageOps.exif_transpose(image)


def resize_and_crop(image: Image.Image, resolution: Sequence[int]) -> Image.Image:
    """Resize (bicubic, antialiased) to cover (height, width), and crop the middle."""
    height, width = resolution
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


class DecodedImages(Dataset):
    """Decoded images (C, H, W), uint8, or the reason why one can't be read."""

    def __init__(self, images: datasets.Dataset, column: str, channels: int, resolution: Sequence[int]):
        self.images, self.column, self.channels, self.resolution = images, column, channels, resolution

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str:
        record = self.images[index][self.column]
        try:
            return self.decode(record)
        except (
            OSError,
            ValueError,
            TypeError,
            SyntaxError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
        ) as e:
            name = (record or {}).get("path")
            return f"row {index}{f' ({name})' if name else ''}: {e or type(e).__name__}"

    def decode(self, record: dict) -> Tensor:
        image = resize_and_crop(to_uint8(open_image(record), self.channels), self.resolution)
        return torch.from_numpy(np.array(image)).reshape(*self.resolution, self.channels).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Spot:
    """Where a process stands: what it takes of each global batch."""

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world

    def rows(self, micro: int) -> range:
        """Rows of the global batch that this process takes in its forward pass number `micro`."""
        start = (micro * self.world + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


class KeyedOrder(Sampler):
    """Lists of dataset indices, one per forward pass, from `step` on: a function of (seed, epoch) and nothing else."""

    def __init__(self, n: int, spot: Spot, seed: int, step: int = 0):
        self.n, self.spot, self.seed, self.step = n, spot, seed, step

    def __iter__(self) -> Iterator[list[int]]:
        step, orders = self.step, {}
        while True:
            for micro in range(self.spot.accumulation):
                indices = []
                for row in self.spot.rows(micro):
                    epoch, offset = divmod(step * self.spot.global_batch + row, self.n)
                    if epoch not in orders:
                        orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                        orders[epoch] = permutation(self.n, self.seed, "epoch", epoch)
                    indices.append(int(orders[epoch][offset]))
                yield indices
            step += 1


class _Rows(Dataset):
    """Batches by lists of indices: {"images": uint8 (B, C, H, W), "labels": int64 (B,) or None}."""

    def __init__(self, images: Tensor | DecodedImages, labels: Tensor | None):
        self.images, self.labels = images, labels

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor | None]:
        if torch.is_tensor(self.images):
            images = self.images[indices]
        else:
            images = torch.stack([self.images.decode(self.images.images[i][self.images.column]) for i in indices])
        return {"images": images, "labels": None if self.labels is None else self.labels[indices]}


def _identity(batch: dict) -> dict:
    return batch


class ImageData:
    """A dataset ready for training: known shape, checked, measured.

    Args:
        args: which dataset, and how its images are prepared.
        class_conditional: read labels as well.
        scanned: the file that remembers that all images were found readable.
        show_progress: show bars.

    Raises:
        ValueError: no such dataset, column or label; an empty dataset; images that can't be read (all are listed).
    """

    vae = None  # the autoencoder, for datasets of latents

    def __init__(
        self, args: DataArguments, class_conditional: bool, scanned: Path | None = None, show_progress: bool = True
    ):
        self.args, self.show_progress = args, show_progress
        source = load_source(args)
        features = source.features or source._resolve_features().features
        self.column = find_image_column(features, args.image_column)
        self.label_column = find_label_column(features, args.label_column) if class_conditional else None
        self.source = source.cast_column(self.column, datasets.Image(decode=False))
        self.channels, self.resolution = self._find_shape()
        self.num_classes = self.labels = None
        if args.streaming:
            self._find_streamed_labels(features)
            self.images = None
        else:
            if self.label_column is not None:
                self._read_labels(features)
            self.images = self._check_all(scanned)

    def _find_shape(self) -> tuple[int, tuple[int, int]]:
        """Channels and (height, width), as asked for, or as the first images have them."""
        modes, size = [], None
        for record in self.source.take(100):
            try:
                image = open_image(record[self.column])
            except Exception:  # whatever is wrong with it, the scan names it
                continue
            modes.append(image.mode)
            size = size or (image.height, image.width)
        if not modes:
            raise ValueError(f"none of the first images of column {self.column!r} can be read.")
        grey = all(mode in GREY_MODES or mode.startswith("I;16") for mode in modes)
        asked = self.args.resolution
        resolution = size if asked is None else tuple(asked * 2 if len(asked) == 1 else asked)
        return self.args.channels or (1 if grey else 3), resolution

    def _read_labels(self, features: datasets.Features) -> None:
        if features[self.label_column].dtype == "string":
            self.source = self.source.class_encode_column(self.label_column)
            features = self.source.features
        values = self.source[self.label_column][:]
        wrong = [i for i, v in enumerate(values) if not isinstance(v, int) or isinstance(v, bool) or v < 0]
        known = getattr(features[self.label_column], "num_classes", None)
        if known is not None:
            wrong += [i for i, v in enumerate(values) if isinstance(v, int) and v >= known]
        if wrong:
            allowed = f"integers in [0, {known - 1}]" if known else "integers from 0 up"
            raise ValueError(
                f"labels of column {self.label_column!r} must be {allowed}; row {wrong[0]} has {values[wrong[0]]!r}"
                f" ({len(wrong)} of {len(values)} rows are wrong)."
            )
        self.labels = torch.tensor(values)
        self.num_classes = known or int(self.labels.max()) + 1

    def _find_streamed_labels(self, features: datasets.Features) -> None:
        if self.label_column is not None:
            self.num_classes = getattr(features[self.label_column], "num_classes", None)
            if self.num_classes is None:
                raise ValueError(
                    f"a streamed dataset needs labels of the kind ClassLabel; {self.label_column!r} is not."
                )

    @property
    def fingerprint(self) -> str:
        """What tells this dataset from others, as the datasets library knows it."""
        return f"{self.source._fingerprint} {self.column}"

    def _check_all(self, scanned: Path | None) -> Tensor | DecodedImages:
        """Decode every image once, so that bad ones are found before training; keep them if there is room."""
        decoder = DecodedImages(self.source, self.column, self.channels, self.resolution)
        keep = len(decoder) * self.channels * self.resolution[0] * self.resolution[1] <= CACHE_BYTES
        if not keep and scanned is not None and scanned.exists() and scanned.read_text() == self.fingerprint:
            return decoder
        loader = DataLoader(decoder, batch_size=None, num_workers=self.args.dataloader_num_workers)
        bar = tqdm(loader, desc="Reading images", disable=not self.show_progress, leave=False)
        images = torch.empty(len(decoder) if keep else 0, self.channels, *self.resolution, dtype=torch.uint8)
        faults = []
        for i, image in enumerate(bar):
            if isinstance(image, str):
                faults.append(image)
            elif keep:
                images[i] = image
        if faults:
            listed = "".join(f"\n  {fault}" for fault in faults[:20]) + ("\n  ..." if len(faults) > 20 else "")
            raise ValueError(f"{len(faults)} of {len(decoder)} images can't be read; repair or remove them:{listed}")
        if scanned is not None and not keep:
            scanned.write_text(self.fingerprint)
        return images if keep else decoder

    def measure_sigma_data(self) -> float:
        """Root mean square of (a sample of) the data scaled to [-1, 1]: what EDM's preconditioning assumes.

        It is the second moment about zero, not the standard deviation about the mean: c_skip = s^2 / (s^2 + sigma^2)
        minimises the error of c_skip x against the data for s^2 = E[x0^2].
        """
        if self.args.streaming:
            decoder = DecodedImages(self.source, self.column, self.channels, self.resolution)
            images = torch.stack([decoder.decode(row[self.column]) for row in self.source.take(1000)])
        else:
            images = self.rows(permutation(len(self.images), "sigma_data")[:SIGMA_DATA_SAMPLES].tolist())
        return round((images.double() / 127.5 - 1).square().mean().sqrt().item(), 4)

    def rows(self, indices: list[int]) -> Tensor:
        """The images (B, C, H, W) at these places of the dataset."""
        return _Rows(self.images, self.labels).__getitems__(indices)["images"]

    def batches(self, spot: Spot, seed: int, step: int = 0) -> Iterator[dict[str, Tensor | None]]:
        """Batches for the forward passes of this process from training step `step` on, without end."""
        if self.args.streaming:
            return self._streamed(spot, seed, step)
        order = KeyedOrder(len(self.images), spot, seed, step)
        workers = 0 if torch.is_tensor(self.images) else self.args.dataloader_num_workers
        rows = _Rows(self.images, self.labels)
        return iter(DataLoader(rows, batch_sampler=order, num_workers=workers, collate_fn=_identity))

    def _streamed(self, spot: Spot, seed: int, step: int) -> Iterator[dict[str, Tensor | None]]:
        decoder = DecodedImages(self.source, self.column, self.channels, self.resolution)
        stream = self.source.shuffle(seed=seed + step, buffer_size=SHUFFLE_BUFFER)
        stream = split_dataset_by_node(stream, spot.rank, spot.world)
        images, labels, epoch = [], [], 0
        while True:
            stream.set_epoch(epoch)
            for row in stream:
                images.append(decoder.decode(row[self.column]))
                labels.append(row[self.label_column] if self.label_column else 0)
                if len(images) == spot.batch_size:
                    yield {
                        "images": torch.stack(images),
                        "labels": torch.tensor(labels) if self.label_column else None,
                    }
                    images, labels = [], []
            epoch += 1
