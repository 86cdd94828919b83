"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) by PEFT: a student is its teacher with an adapter.

The weights of the teacher are frozen, and the student shares them (`core.frozen.copied`), so no second copy exists. A
checkpoint, an average and an export of the student hold the adapter's weights alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm_diffusers.core.frozen import copied
from cm_diffusers.engine.saved.base_precision import full_state


ADAPTER = "default"  # the name under which diffusers saves and loads one adapter
TARGETS = (  # the layers of LCM-LoRA (Luo et al. 2023, arXiv:2311.05556)
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"
)  # fmt: skip


def add_lora(
    network: nn.Module, rank: int, alpha: float | None = None, target_modules: Sequence[str] | None = None
) -> nn.Module:
    """Freeze `network`, and add a new adapter, which changes no output until it is trained. Returns the same network.

    Any network takes an adapter, also one without diffusers' `add_adapter`, such as `UNet2DModel`.

    Args:
        network: the base, in any dtype; the adapter's weights are float32.
        rank: rank of the updates.
        alpha: the updates are scaled by alpha / rank; None for `rank`.
        target_modules: ends of the names of the layers that get an update; None for those of `TARGETS` that exist.

    Raises:
        ValueError: PEFT is missing, the network has an adapter, or no layer has such a name.
    """
    peft = import_peft()
    others = getattr(network, "peft_config", {})
    if others:
        raise ValueError(
            f"The network has an adapter already: {', '.join(others)}. Make it a part of the weights first, by"
            " pipe.fuse_lora() and pipe.unload_lora_weights()."
        )
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    asked = TARGETS if target_modules is None else target_modules
    there = [end for end in asked if any(name == end or name.endswith(f".{end}") for name in names)]
    unknown = [end for end in asked if end not in there]
    if unknown and (target_modules is not None or not there):
        known = ", ".join(sorted(set(map(_end, names))))
        raise ValueError(f"lora_target_modules {', '.join(unknown)}: no layer has such a name. There are {known}.")
    network.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=there,
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


def has_lora(network: nn.Module) -> bool:
    """Whether `network` has an adapter of `add_lora`."""
    return ADAPTER in getattr(network, "peft_config", {})


def fuse_passes(network: nn.Module) -> None:
    """Let each adapted layer of `network` compute one product with W + (alpha / rank) B A, which is not kept.

    PEFT's two thin products cost more, but this way needs memory for a weight in a backward pass. So it is meant for
    networks without gradients, such as a target. Layers with weights in 8 or 4 bits stay as they are.

    Args:
        network: see `add_lora`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer) and type(layer.get_base_layer()) in (nn.Linear, nn.Conv2d):
            layer.forward = partial(_fused_pass, layer)


def _fused_pass(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = layer.get_base_layer()
    down, up = (part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
    update = layer.scaling[ADAPTER] * (up.flatten(1) @ down.flatten(1)).view_as(base.weight)
    weight = (base.weight + update).to(base.weight.dtype)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, base.bias)
    return base._conv_forward(x, weight, base.bias)


@torch.no_grad()
def fused_state(network: nn.Module, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network without an adapter that has the outputs of `network` with these adapter weights.

    Args:
        network: see `add_lora`.
        adapter: the weights (any shape) of `trained_weights`, or an average of them, by the same names.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    fused = copied(network)
    fused.load_state_dict(adapter, strict=False)
    state = {name: value.float() for name, value in full_state(fused).items() if "lora_" not in name}
    for name, layer in fused.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = f"{name}.base_layer.weight"
            state[weight] = state[weight] + layer.get_delta_weight(ADAPTER).float()
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights on the CPU, by PEFT's names."""
    state = import_peft().get_peft_model_state_dict(network, adapter_name=ADAPTER)
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


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs another package. Run: pip install 'cm-diffusers[lora]'") from None
    return peft
