"""diffusers' class-conditional transformer (DiT, Peebles & Xie 2022, arXiv:2212.09748), called like the U-Nets."""

import torch
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput
from torch import Tensor


class DiTModel(ModelMixin, ConfigMixin):
    """A `DiTTransformer2DModel` with the call signature of the library's networks. Make it with `from_transformer`.

    Labels are not dropped at random. The label `num_class_embeds` is the null class.

    Args:
        transformer_config: config of the transformer.
        sample_size, in_channels, out_channels, num_class_embeds, dropout: replace the entries of
            `transformer_config` where given. Thus this network's config has the same keys as the others'.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        transformer_config: dict | None = None,
        sample_size: int | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
        num_class_embeds: int | None = None,
        dropout: float | None = None,
    ):
        super().__init__()
        given = {"sample_size": sample_size, "in_channels": in_channels, "out_channels": out_channels}
        given |= {"num_embeds_ada_norm": num_class_embeds, "dropout": dropout}
        given = {name: value for name, value in given.items() if value is not None}
        self._wrap(DiTTransformer2DModel.from_config({**(transformer_config or {}), **given}))

    def _wrap(self, transformer: DiTTransformer2DModel) -> None:
        self.transformer = transformer
        for module in transformer.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # its draws would not depend on the seed
        config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        self.register_to_config(
            transformer_config=config,
            sample_size=config["sample_size"],
            in_channels=config["in_channels"],
            out_channels=transformer.out_channels,
            num_class_embeds=config["num_embeds_ada_norm"],
            dropout=config["dropout"],
        )
        self.register_to_config(_use_default_values=[])  # from_config(config) would leave out names listed there

    @classmethod
    def from_transformer(cls, transformer: DiTTransformer2DModel) -> "DiTModel":
        """Wrap `transformer` itself, without a copy, with its weights, dtype, device and mode."""
        config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(config)
        model._wrap(transformer)
        return model.train(transformer.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Apply the transformer to `sample` (B, C, H, W).

        Args:
            sample: noisy images or latents.
            timestep: a number, () or (B,), in the unit of the transformer (a stock DiT: timesteps 0..999).
            class_labels: int64 (B,) in [0, num_class_embeds]. The last label and None mean the null class.
            return_dict: False gives the tuple (sample,).
        """
        if not torch.is_tensor(timestep):
            timestep = torch.full((), timestep, device=sample.device)
        timestep = timestep.to(sample.device).expand(sample.shape[0])
        if class_labels is None:
            class_labels = torch.full((sample.shape[0],), self.config.num_class_embeds, device=sample.device)
        return self.transformer(sample, timestep, class_labels, return_dict=return_dict)
