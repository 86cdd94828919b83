"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) by PEFT: teacher and student in one network.

The base weights are frozen. With the adapter the network is the student, without it the teacher, so no second copy of
the weights exists. A checkpoint, an average and an export need the adapter's weights alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


ADAPTER = "default"  # the name under which diffusers saves and loads one adapter
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the layers of diffusers' LoRA scripts


def add_lora(
    network: nn.Module, rank: int, alpha: float | None = None, target_modules: Sequence[str] = ATTENTION
) -> nn.Module:
    """Freeze `network`, and add a new adapter, which changes no output until it is trained. Returns the same network.

    Any network takes an adapter, also one without diffusers' `add_adapter`, such as `UNet2DModel`.

    Args:
        network: the base, in any dtype; the adapter's weights are float32.
        rank: rank of the updates.
        alpha: the updates are scaled by alpha / rank; None for `rank`.
        target_modules: ends of the names of the layers that get an update.

    Raises:
        ValueError: PEFT is missing, the network has an adapter, or no layer has such a name.
    """
    peft = _peft()
    others = getattr(network, "peft_config", {})
    if others:
        raise ValueError(
            f"The network has an adapter already: {', '.join(others)}. Make it a part of the weights first, by"
            " pipe.fuse_lora() and pipe.unload_lora_weights()."
        )
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    unknown = [end for end in target_modules if not any(name == end or name.endswith(f".{end}") for name in names)]
    if unknown:
        known = ", ".join(sorted(set(map(_end, names))))
        raise ValueError(f"lora_target_modules {', '.join(unknown)}: no layer has such a name. There are {known}.")
    network.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=list(target_modules),
        init_lora_weights="gaussian",
    )
    if hasattr(network, "add_adapter"):
        network.add_adapter(config, adapter_name=ADAPTER)
    else:
        peft.inject_adapter_in_model(config, network, ADAPTER)
    for weight in trained_weights(network).values():
        weight.data = weight.data.float()
    return network


def _end(name: str) -> str:
    """The end of a layer's name, with the word before a number: `to_out.0`."""
    *_, before, last = ["", *name.split(".")]
    return f"{before}.{last}" if last.isdigit() else last


def trained_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that require a gradient, by name: those of the adapter."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


@contextmanager
def adapter_off(network: nn.Module) -> Iterator[None]:
    """Calls of `network` inside this block have the outputs of the base, to the bit.

    PEFT switches `requires_grad` of the adapter's weights off as well; at the end of the block it is on again.
    """
    with _switched_off(_layers(network)):
        yield


def _layers(network: nn.Module) -> list[Any]:
    """The layers of `network` that have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def _switched_off(layers: Sequence[Any]) -> Iterator[None]:
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Base:
    """The base of a network with an adapter, called like the network: the teacher, without a gradient.

    Args:
        network: see `add_lora`.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self._adapted = _layers(network)  # found once, as training calls the teacher in every step

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _switched_off(self._adapted):
            return self.network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)  # config, adapt_condition


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights on the CPU, by PEFT's names."""
    state = _peft().get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: value.detach().cpu() for name, value in state.items()}


def save_lora(pipeline: Any, folder: str | Path) -> None:
    """Write `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(folder)`.

    The file has the metadata of the adapter, without which diffusers would load it with a scale of 1 for any alpha.

    Args:
        pipeline: a text-to-image pipeline of diffusers, whose `unet` has the adapter.
        folder: where to write.
    """
    pipeline.save_lora_weights(
        folder,
        unet_lora_layers=lora_state(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config[ADAPTER].to_dict(),
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs another package. Run: pip install 'cm-diffusers[lora]'") from None
    return peft
