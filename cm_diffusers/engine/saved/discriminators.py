"""From settings to a discriminator: on pixels, or on the features of a pretrained vision model."""

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig

from cm_diffusers.lookup import looked_up
from cm_diffusers.models.discriminator import PatchDiscriminator, ProjectedDiscriminator


ALLOWED = (
    "give a folder or a Hub id of a vision model that transformers' AutoBackbone can load, for example"
    " facebook/dinov2-small, or leave the option out for a discriminator on pixels."
)


def load_backbone(name_or_path: str) -> nn.Module:
    """A pretrained vision model that gives the feature maps of all its stages, in float32.

    Raises:
        ValueError: there is no such model, transformers has no backbone of its kind, or weights are missing.
    """
    try:
        with looked_up(name_or_path) as cached:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, local_files_only=cached)
        if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
            raise ValueError(f"transformers has no backbone of kind {config.model_type!r}.")
        config.out_features = [stage for stage in config.stage_names if stage != "stem"]
        # the class itself, as AutoBackbone.from_pretrained takes a folder for a model of timm
        backbone, info = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
            name_or_path, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=cached
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"backbone {name_or_path!r} can't be loaded; {ALLOWED} Reason: {error}") from error
    # norms of the feature maps are a backbone's own, unknown to the model it was saved from, and start as identities
    missing = sorted(name for name in info["missing_keys"] if "hidden_states_norms" not in name)
    if missing:
        raise ValueError(f"backbone {name_or_path!r} lacks weights, {', '.join(missing[:3])} among them; {ALLOWED}")
    return backbone


def build_discriminator(
    channels: int, num_classes: int | None = None, backbone: str | None = None, image_size: int | None = None
) -> PatchDiscriminator | ProjectedDiscriminator:
    """The discriminator for images of so many channels and classes (None for no classes).

    Args:
        channels: of the images.
        num_classes: None for a discriminator without classes.
        backbone: folder or Hub id of a vision model that transformers' AutoBackbone can load; None for pixels.
        image_size: side of the images that the backbone sees; default: its config's.

    Raises:
        ValueError: the backbone can't be loaded, or does not see images of so many channels; an image_size and no
            backbone.
    """
    if backbone is not None:
        return ProjectedDiscriminator(load_backbone(backbone), channels, num_classes, image_size=image_size)
    if image_size is not None:
        raise ValueError(f"image_size {image_size} is read only with a backbone.")
    return PatchDiscriminator(channels, num_classes)
