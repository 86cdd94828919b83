"""Networks with two times, for flow maps and trajectory models: the current noise level and the target.

The embedding of the second time is added to that of the first, as in CTM (Kim et al. 2023, arXiv:2310.02279) and in
mean flows (Geng et al. 2025, arXiv:2505.13447). Its last layer starts at zero, so training starts from the wrapped
network.
"""

import copy
import os
import threading
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn


MIRRORED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "dropout")
_call = threading.local()  # `.embedding`: second-time embedding of the call in progress in this thread


@dataclass
class TwoTimeOutput(BaseOutput):
    """Output of `TwoTimeModel`.

    Args:
        sample: the output image (B, C, H, W).
        log_variance: the adaptive log-variance (B,); None if the network has no such head.
    """

    sample: Tensor
    log_variance: Tensor | None = None


class TargetTimeEmbedding(nn.Module):
    """cos and sin of a time at bounded frequencies, then two linear layers, of which the second starts at zero.

    It computes in float32 or better, even under autocast or with weights of lower precision: in bfloat16 neighbouring
    times become one.

    Args:
        channels: size of the embedding.
        scale: highest frequency in radians per unit of time; the lowest is `scale` / 10.
    """

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = scale
        self.linear_1 = nn.Linear(2 * (channels // 8), channels)
        self.linear_2 = nn.Linear(channels, channels)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, time: Tensor) -> Tensor:
        """Embed `time` (B,) as (B, channels)."""
        exponents = torch.linspace(0, -1, self.linear_1.in_features // 2, dtype=time.dtype, device=time.device)
        angles = time[:, None] * (self.scale * 10**exponents)
        dtype = torch.promote_types(self.linear_1.weight.dtype, torch.float32)
        h = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
        with torch.autocast(time.device.type, enabled=False):
            h = F.silu(F.linear(h, self.linear_1.weight.to(dtype), self.linear_1.bias.to(dtype)))
            return F.linear(h, self.linear_2.weight.to(dtype), self.linear_2.bias.to(dtype))

    def add_current(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Add the embedding of the call in progress to `output` (B, channels).

        It is a forward hook of the first time's embedding; `module` and `args` are unused.
        """
        embedding = getattr(_call, "embedding", None)
        if embedding is None:
            return output
        # a network in bfloat16 continues in bfloat16; under autocast, with weights in float32, it stays in float32
        return (output + embedding).to(torch.promote_types(output.dtype, self.linear_1.weight.dtype))


def _class_named(name: str, near: str) -> type[ModelMixin]:
    """The diffusers model class called `name`, else the loaded class of that name nearest to the module `near`.

    The class is not imported, because this file and the network's change packages in the folder of a saved model.

    Raises:
        ValueError: no class has this name.
    """
    stock = getattr(diffusers, name, None)
    if isinstance(stock, type) and issubclass(stock, ModelMixin):
        return stock
    found = [cls for cls in ModelMixin.__subclasses__() if cls.__name__ == name]
    if not found:
        raise ValueError(f"network_class {name!r} is neither a diffusers model nor loaded. Import the class first.")
    return max(found, key=lambda cls: len(os.path.commonprefix([cls.__module__, near])))


class TwoTimeModel(ModelMixin, ConfigMixin):
    """A wrapper that gives a `JVPUNet2DModel`, `UNet2DModel` or similar a second time. Make it with `from_network`.

    Args:
        network_class: class name of the wrapped network.
        network_config: config of the wrapped network.
        target_time_scale: highest frequency of the second time's features, in radians per unit of time. Use 4 for
            angles and flow times, 1 / 250 for the labels 250 ln(sigma).
        sample_size, in_channels, out_channels, num_class_embeds, dropout, log_variance: replace the entries of
            `network_config` where given. Thus this network's config has the same keys as the others'.

    Raises:
        ValueError: no class is called `network_class`.
    """

    _supports_gradient_checkpointing = True
    # the second time's embedding is only as precise as its weights
    _skip_layerwise_casting_patterns = ["norm", "target_time_embedding"]

    @register_to_config
    def __init__(
        self,
        network_class: str = "JVPUNet2DModel",
        network_config: dict | None = None,
        target_time_scale: float = 4.0,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
        num_class_embeds: int | None = None,
        dropout: float | None = None,
        log_variance: bool | None = None,
    ):
        super().__init__()
        replaced = {name: self.config[name] for name in (*MIRRORED, "log_variance")}
        replaced = {name: value for name, value in replaced.items() if value is not None}
        config = {**(network_config or {}), **replaced}
        self._wrap(_class_named(network_class, type(self).__module__).from_config(config))

    def _wrap(self, network: ModelMixin) -> None:
        self.network = network
        last = [module for module in network.time_embedding.modules() if isinstance(module, nn.Linear)][-1]
        branch = TargetTimeEmbedding(last.out_features, self.config.target_time_scale)
        self.target_time_embedding = branch.to(last.weight.device, last.weight.dtype)
        # a bound method, so that a deep copy of this model has its own hook
        network.time_embedding.register_forward_hook(self.target_time_embedding.add_current)
        config = {name: value for name, value in network.config.items() if not name.startswith("_")}
        mirrored = {name: config[name] for name in MIRRORED}
        self.register_to_config(network_config=config, log_variance=config.get("log_variance"), **mirrored)
        # from_config(config) would leave out names listed there
        self.register_to_config(_use_default_values=[])

    @classmethod
    def from_network(cls, network: ModelMixin, target_time_scale: float = 4.0) -> "TwoTimeModel":
        """Wrap a copy of `network`, with its weights, dtype, device and mode.

        See the class for `target_time_scale`.

        Raises:
            ValueError: `network` has no `time_embedding`, to which the second one could be added.
        """
        if not hasattr(network, "time_embedding"):
            raise ValueError(
                f"A {type(network).__name__} can't read a second time, because it has no `time_embedding` to extend."
                " Use a U-Net."
            )
        config = {name: value for name, value in network.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = cls(type(network).__name__, config, target_time_scale)
        model._wrap(copy.deepcopy(network))
        return model.train(network.training)

    def add_log_variance_head(self) -> None:
        """See `JVPUNet2DModel.add_log_variance_head`."""
        self.network.add_log_variance_head()
        self.register_to_config(log_variance=True)

    def remove_log_variance_head(self) -> None:
        """See `JVPUNet2DModel.remove_log_variance_head`."""
        self.network.remove_log_variance_head()
        self.register_to_config(log_variance=False)

    @property
    def key_dropout(self):
        """`key_dropout` of the wrapped network; AttributeError if it has no such method."""
        return self.network.key_dropout

    @property
    def adapt_condition(self):
        """`adapt_condition` of the wrapped network; AttributeError if it has no such method."""
        return self.network.adapt_condition

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        target_timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **condition: Tensor,
    ) -> TwoTimeOutput | tuple[Tensor, ...]:
        """Apply the network to `sample` (B, C, H, W) at `timestep` for a jump to `target_timestep`.

        Args:
            timestep: a number, () or (B,), in the unit of the wrapped network.
            target_timestep: a number, () or (B,), in the same unit. None calls the wrapped network with one time.
            class_labels: int64 (B,), for a class-conditional network.
            return_dict: False returns the tuple (sample,) or (sample, log_variance).
            condition: further conditioning, passed to the wrapped network as keyword arguments.
        """
        if class_labels is not None:
            condition["class_labels"] = class_labels
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if isinstance(timestep, float):  # the stock network would round a float
            timestep = torch.full((), timestep, dtype=dtype, device=sample.device)
        if target_timestep is not None:
            if not torch.is_tensor(target_timestep):
                target_timestep = torch.full((), target_timestep, dtype=dtype, device=sample.device)
            target_timestep = target_timestep.to(sample.device, torch.promote_types(target_timestep.dtype, dtype))
            _call.embedding = self.target_time_embedding(target_timestep.expand(sample.shape[0]))
        try:
            output = self.network(sample, timestep, return_dict=False, **condition)
        finally:
            _call.embedding = None
        return TwoTimeOutput(*output) if return_dict else output
