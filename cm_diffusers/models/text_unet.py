"""Text-to-image U-Nets of diffusers (Stable Diffusion, SDXL, LCM), called with a `core.conditions.Condition`.

| entry | shape | for |
|---|---|---|
| text | (B, n, d) | embeddings of the prompt's n tokens, by cross-attention |
| pooled | (B, p) | SDXL: pooled embedding of the prompt |
| sizes | (B, 6) | SDXL: original height and width, crop from the top and left, target height and width |
| guidance | (B,) | LCM: guidance scale w, 1 is none, as an input of the network |
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor


def with_conditions(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Let `core.conditions.call_network` pass a condition to `unet`. Returns the same network.

    Args:
        unet: a text-to-image U-Net, which accepts real times () or (B,).

    Raises:
        ValueError: the network has another additional input than SDXL's.
    """
    kind = unet.config.addition_embed_type
    if kind not in (None, "text_time"):
        raise ValueError(
            f"This U-Net has the additional input {kind!r} (addition_embed_type). This version reads networks without"
            " one (Stable Diffusion, LCM) and with 'text_time' (SDXL)."
        )
    unet.adapt_condition = partial(_keywords, wanted_entries(unet), unet.config.time_cond_proj_dim)
    return unet


def with_guidance_input(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """A copy of `unet` with an input for the guidance scale, which has no effect until it is trained.

    Args:
        unet: a network that `with_conditions` has prepared.
        channels: size of the embedding of the scale (`time_cond_proj_dim`).
    """
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    network = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": channels})
    new = "time_embedding.cond_proj.weight"
    network.load_state_dict(unet.state_dict() | {new: torch.zeros_like(network.state_dict()[new])})
    return with_conditions(network).train(unet.training)


def wanted_entries(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """The names of the entries that the conditions of `unet` need; "guidance" can be left out."""
    added = ("pooled", "sizes") if unet.config.addition_embed_type == "text_time" else ()
    guidance = () if unet.config.time_cond_proj_dim is None else ("guidance",)
    return ("text", *added, *guidance)


def _keywords(wanted: tuple[str, ...], guidance_channels: int | None, condition: Any) -> dict[str, Any]:
    """The keyword arguments of the U-Net for a `Condition`.

    Raises:
        ValueError: an entry is missing, or the network has no input for one.
    """
    entries = condition.entries
    missing = [name for name in wanted if name not in entries and name != "guidance"]
    unknown = [name for name in entries if name not in wanted]
    if missing or unknown:
        raise ValueError(
            f"The condition of this U-Net needs the entries {', '.join(wanted)};"
            f" it has {', '.join(entries) or 'none'}."
        )
    keywords: dict[str, Any] = {"encoder_hidden_states": entries["text"]}
    if "pooled" in wanted:
        keywords["added_cond_kwargs"] = {"text_embeds": entries["pooled"], "time_ids": entries["sizes"]}
    if guidance_channels is not None and "guidance" in entries:
        keywords["timestep_cond"] = guidance_embedding(entries["guidance"], guidance_channels)
    return keywords


def guidance_embedding(scale: Tensor, channels: int) -> Tensor:
    """Sines and cosines of a guidance scale w (B,), (B, channels), as in diffusers' LCM pipelines.

    The angles are 1000 (w - 1) 10000^(-i / (h - 1)) for i = 0 .. h - 1, with h = channels / 2 rounded down.

    Args:
        scale: w >= 1, where 1 is no guidance.
        channels: size of the embedding; an odd one ends with a zero.
    """
    half = channels // 2
    rates = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=scale.device))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, channels % 2))
