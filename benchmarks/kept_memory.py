"""Memory that a network keeps between its forward and its backward pass, in MiB per image.

    python benchmarks/kept_memory.py

It is the difference between batches of 3 and 2 images in the bytes of distinct storages saved for the backward pass,
so that weights and their 16-bit copies don't count. Setting: training mode without dropout, 3 channels, 10 classes.
On a GPU, autocast keeps more values in float32 than on a CPU.
"""

import argparse

import torch
from common import show

from cm_diffusers.models import EDM_PRESETS, UNET_PRESETS, build_unet


SIZES = {"ddpmpp_32": 32, "adm_64": 64, "jvp_cifar10": 32, "cifar10": 32}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def kept_bytes(network: torch.nn.Module, images: int, side: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that a forward pass of `images` images saves for the backward pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[int, int] = {}
    kept = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor.detach())
        return tensor

    x, times = torch.randn(images, 3, side, side, device=device), torch.rand(images, device=device)
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            output = network(x, times, class_labels=labels).sample
    del output
    return sum(sizes.values())


def kept_bytes_per_image(network: torch.nn.Module, side: int, dtype: torch.dtype) -> int:
    """The part of `kept_bytes` that grows with the number of images."""
    more, fewer = (kept_bytes(network, images, side, dtype) for images in (3, 2))
    return more - fewer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = list(UNET_PRESETS | EDM_PRESETS)
    parser.add_argument(
        "--presets", nargs="+", choices=choices, default=list(SIZES), help=f"default: {' '.join(SIZES)}"
    )
    parser.add_argument("--mixed_precision", choices=list(DTYPES), default="bf16", help="default: bf16")
    args = parser.parse_args()
    rows = {}
    for preset in args.presets:
        side = SIZES.get(preset, 32)
        network = build_unet(preset, (side, side), 3, 10).train().to("cuda" if torch.cuda.is_available() else "cpu")
        kept = kept_bytes_per_image(network, side, DTYPES[args.mixed_precision])
        rows[preset] = {"mib_per_image": round(kept / 2**20, 1)}
        del network
    show(rows)
