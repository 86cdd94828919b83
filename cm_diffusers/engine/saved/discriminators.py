"""Construction of discriminators, on pixels or on the features of a pretrained vision model."""

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig

from cm_diffusers.lookup import looked_up
from cm_diffusers.models.discriminator import PatchDiscriminator, ProjectedDiscriminator


ALLOWED = (
    "Give a folder or a Hub id of a vision model that transformers' AutoBackbone can load, for example"
    " facebook/dinov2-small, or leave the option out for a discriminator on pixels."
)


def load_backbone(name_or_path: str) -> nn.Module:
    """Load a pretrained vision model in float32 that returns the feature maps of all its stages.

    Args:
        name_or_path: a folder or a Hub id.

    Raises:
        ValueError: the model is missing or lacks weights, or transformers has no backbone of its type.
    """
    try:
        with looked_up(name_or_path) as cached:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, local_files_only=cached)
        if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
            raise ValueError(f"transformers has no backbone of type {config.model_type!r}.")
        config.out_features = [stage for stage in config.stage_names if stage != "stem"]
        # the class itself, because AutoBackbone.from_pretrained takes a folder for a timm model
        backbone, info = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
            name_or_path, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=cached
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"backbone {name_or_path!r} can't be loaded. {ALLOWED} Reason: {error}") from error
    # a backbone adds norms of the feature maps, which saved models lack; they start as identities
    missing = sorted(name for name in info["missing_keys"] if "hidden_states_norms" not in name)
    if missing:
        raise ValueError(f"backbone {name_or_path!r} lacks weights, for example {', '.join(missing[:3])}. {ALLOWED}")
    return backbone


def build_discriminator(
    channels: int, num_classes: int | None = None, backbone: str | None = None, image_size: int | None = None
) -> PatchDiscriminator | ProjectedDiscriminator:
    """Build a discriminator on pixels, or on the features of a backbone.

    Args:
        channels: channels of the images.
        num_classes: number of classes; None for an unconditional discriminator.
        backbone: folder or Hub id of a vision model that transformers' AutoBackbone can load; None for pixels.
        image_size: side of the images that the backbone sees, in pixels; None uses its config's, or 224.

    Raises:
        ValueError: the backbone can't be loaded, `channels` is neither 1 nor 3 with a backbone, or `image_size` is
            given without one.
    """
    if backbone is not None:
        return ProjectedDiscriminator(load_backbone(backbone), channels, num_classes, image_size=image_size)
    if image_size is not None:
        raise ValueError(
            f"image_size {image_size} has no effect without a backbone. Give a backbone, or leave it out."
        )
    return PatchDiscriminator(channels, num_classes)
