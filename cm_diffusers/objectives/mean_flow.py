"""MeanFlow (Geng et al. 2025, arXiv:2505.13447, algorithm 1).

The network u(x_t, t, r) has two times. It predicts the average velocity of linear flow matching's ODE between r and t,
so one call jumps from t to r: x_r = x_t - (t - r) u. Unlike sCM it learns all jumps, not only those to the data. Like
sCT it takes the ODE's velocity from the data; with r = t it is flow matching. Flow times are in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.conditions import call_network
from cm_diffusers.core.denoisers import ProcessDenoiser, jump_to_zero
from cm_diffusers.core.distances import l2
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.tangents import jvp, jvp_ready
from cm_diffusers.models import TwoTimeModel
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.continuous import JVP_MODES, check_tangents
from cm_diffusers.objectives.options import Options, option
from cm_diffusers.objectives.spec import ModelSpec
from cm_diffusers.pipelines import MeanFlowPipeline


@dataclass(frozen=True)
class MeanFlowOptions(Options):
    p_mean: float = option(
        -2.0, "Mean of the logit of the two flow times t and r; the paper uses -0.4 for ImageNet latents.", "[-20, 20]"
    )
    p_std: float = option(
        2.0,
        "Standard deviation of the logit of the two flow times t and r; the paper uses 1 for ImageNet latents.",
        "[1e-3, 10]",
    )
    equal_times: float = option(
        0.25,
        "Share of the samples with equal times r = t, which is flow matching; the paper uses 0.75 for ImageNet"
        " latents.",
        "[0, 1]",
    )
    power: float = option(
        0.75, "Power p of the weight 1 / (|error|^2 + c)^p; the paper uses 1 for ImageNet latents.", "[0, 4]"
    )
    weight_c: float = option(1e-3, "Constant c of the weight 1 / (|error|^2 + c)^p.", "[1e-12, 1e6]")
    jvp_mode: str = option(
        "exact",
        "Computation of tangents: forward-mode differentiation (exact), the central difference of two more calls"
        " (finite_difference), or exact with the central difference as fallback (auto).",
        choices=JVP_MODES,
    )


class MeanFlow(Objective):
    """E[ w |u(x_t, t, r) - sg(v - (t - r) du/dt)|^2 ], v = noise - x0, w = sg 1 / (|.|^2 + c)^p (eq. 10, 22).

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import Batch, MeanFlow, ModelSpec
        >>> spec = ModelSpec(sigma_data=0.5, time_label="flow_time", prediction="flow")
        >>> unet = MeanFlow.adapt(build_unet("jvp_tiny", (8, 8), channels=1), spec)  # with a second time input
        >>> method = MeanFlow(unet, spec, MeanFlow.Options(), total_steps=1000)
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> pipe = method.pipeline(unet)
    """

    name = "mean_flow"
    Options = MeanFlowOptions
    sigma_min = floor = 0.0
    native_predictions = ("flow",)
    needs_tangents = two_times = True
    levels = ()
    summary = Summary(
        what="average velocities, jumps between any times",
        target="its velocity less its tangent, no gradient",
        times="logit of t and r ~ N(-2, 2^2), a quarter equal",
        distance="L2",
        weight="1 / (error + c)^p",
        paper="[Geng et al. 2025](https://arxiv.org/abs/2505.13447), alg. 1",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_tangents(self.network, self.options.jvp_mode, second_time="target_timestep")

    @classmethod
    def prediction(cls, options: MeanFlowOptions) -> str:
        return "flow"

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        return network if isinstance(network, TwoTimeModel) else TwoTimeModel.from_network(network, spec.frequency)

    def denoiser(self, network: Callable | None = None) -> ProcessDenoiser:
        return jump_to_zero(self.model if network is None else network, self.spec.time_scale)

    def times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Flow times t >= r (B,): two logit-normal numbers from `draws`, sorted, and equal for a share of samples."""
        logits = self.options.p_mean + self.options.p_std * draws.normal("times", (2,))
        t, r = logits.sigmoid().sort(1, descending=True).values.unbind(1)
        return t, torch.where(draws.uniform("equal") < self.options.equal_times, t, r)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, condition = batch.samples, batch.condition
        scale = self.spec.time_scale
        t, r = self.times(draws)
        noise = draws.normal("noise", x0.shape[1:])
        x_t = append_dims(1 - t, x0) * x0 + append_dims(t, x0) * noise
        v = noise - x0

        def network(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            with draws.dropout():
                times = {"target_timestep": scale * r}
                return call_network(self.network, x, scale * t, condition=condition, **times).sample

        with jvp_ready(self.network, self.options.jvp_mode):
            tangents = (v, torch.ones_like(t), torch.zeros_like(r))
            _, du_dt = jvp(network, (x_t, t, r), tangents, self.options.jvp_mode)
        with draws.dropout():
            output = call_network(self.model, x_t, scale * t, condition=condition, target_timestep=scale * r)
        u = output.sample.to(x0.dtype)
        error = l2(u, v - append_dims(t - r, x0) * du_dt)  # eq. 10
        weight = (error.detach() + self.options.weight_c) ** -self.options.power  # eq. 22
        return Loss.mean(weight * error, t / (1 - t))

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
        return MeanFlowPipeline(network, scheduler, time_scale=self.spec.time_scale)
