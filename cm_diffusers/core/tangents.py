"""Directional derivatives of networks, by forward-mode differentiation or finite differences.

The tangent carries no autograd graph. A loss takes it as a constant and gets its gradient from an ordinary forward
pass. Memory therefore stays near that of a plain step, and DDP, compiled and checkpointed networks work as usual.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_diffusers.core.arrays import append_dims


MODES = ("auto", "exact", "finite_difference")
NORMS = ("norm", "rms", "clip", "none")
NO_DERIVATIVE = ("xformers", "flash", "sage", "npu", "xla", "flex", "aiter")  # names of attention kernels


class NotDifferentiable(ValueError):
    """A network has a part without a forward-mode derivative."""


@contextmanager
def jvp_ready(model: nn.Module, mode: str = "exact") -> Iterator[nn.Module]:
    """Give `model` exact tangents inside this block.

    Attention runs on the math kernel, and group norms get contiguous inputs. Stock U-Nets need both (torch 2.13): the
    flash kernel has no forward derivative, and that of a group norm fails on the channels-last output of an attention
    block. Inside the block outputs are equal up to rounding. Weights, and outputs outside the block, do not change.

    Args:
        model: the network.
        mode: that of `jvp`. "finite_difference" changes nothing; "auto" does not check the network.

    Raises:
        NotDifferentiable: in mode "exact", `model` still has a part without a forward derivative. The message names a
            remedy.
    """
    if mode == "finite_difference":
        yield model
        return
    if mode == "exact":
        check_differentiable(model)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                stack.callback(module.register_forward_pre_hook(_contiguous).remove)
        yield model


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.contiguous() for argument in args)


def check_differentiable(model: nn.Module) -> None:
    """Check `model` for parts that are known to have no forward derivative.

    Raises:
        NotDifferentiable: the name of the part, and a remedy.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
            raise NotDifferentiable(
                f"{name} is a {type(module).__name__} in training mode. It updates its running statistics in place, so"
                " it has no forward derivative. Use GroupNorm, or put this layer in evaluation mode."
            )
        processor = getattr(module, "processor", None)
        backend = getattr(processor, "_attention_backend", None)
        kernel = f"{type(processor).__name__} {getattr(backend, 'value', backend) or ''}".lower()
        if processor is not None and any(word in kernel for word in NO_DERIVATIVE):
            raise NotDifferentiable(
                f"{name} computes attention by {kernel.strip()}, which has no forward derivative."
                " Use the default processor (diffusers' AttnProcessor2_0) and backend."
            )


def jvp(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    mode: str = "auto",
    relative_step: float | None = None,
) -> tuple[Tensor, Tensor]:
    """function(*primals) and its derivative along `tangents`, both without an autograd graph.

    Args:
        function: a batched function. Random numbers that it draws (dropout) are the same in all of its evaluations.
        primals: tensors (B, ...).
        tangents: tensors of the same shapes.
        mode: "exact" is forward-mode differentiation; networks need `jvp_ready`. "finite_difference" is the central
            difference: two more evaluations, no requirements, and a relative error of about 1e-3 in float32. "auto"
            is "exact" if possible, else the central difference with a warning.
        relative_step: step of the central difference per sample, relative to the size of its primals.
            Default: the cube root of the precision of their dtype.

    Raises:
        NotDifferentiable: in mode "exact", `function` has no forward derivative.
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}.")
    primals, tangents = tuple(primals), tuple(tangents)
    with torch.no_grad():
        if mode == "finite_difference":
            return _central_difference(function, primals, tangents, relative_step)
        try:
            result = torch.func.jvp(function, primals, tangents)
            return result[0], result[1]
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not _is_about_differentiation(error):
                raise
            reason = str(error).split("\n")[0]
            if mode == "exact":
                raise NotDifferentiable(
                    f"The network has no forward derivative ({reason}). Take its tangents inside jvp_ready(network),"
                    " or use finite differences (mode finite_difference)."
                ) from error
            warnings.warn(
                f"The network has no forward derivative, so finite differences are used ({reason}).", stacklevel=2
            )
            return _central_difference(function, primals, tangents, relative_step)


def normalised(g: Tensor, kind: str, c: float = 0.1) -> Tensor:
    """A bounded version of a tangent.

    Args:
        g: the tangent (B, ...).
        kind: "norm" is g / (|g| + c) with the norm of the sample (Lu & Song 2024, arXiv:2410.11081, section 4.2).
            "rms" has its root mean square in place of the norm. "clip" clamps g to [-1, 1]. "none" returns g.
        c: the constant c of "norm" and "rms".
    """
    if kind == "clip":
        return g.clamp(-1, 1)
    if kind == "none":
        return g
    norm = _rms(g) if kind == "rms" else torch.linalg.vector_norm(g.flatten(1), dim=1)
    return g / append_dims(norm + c, g)


def _is_about_differentiation(error: Exception) -> bool:
    words = ("forward AD", "forward-mode", "functorch", "jvp", "setup_context", "view size is not compatible")
    return any(word in str(error) for word in words)


def _central_difference(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], step: float | None
) -> tuple[Tensor, Tensor]:
    if step is None:
        step = torch.finfo(primals[0].dtype).eps ** (1 / 3)
    moved = [_rms(v) / _rms(p).clamp(min=1e-12) for p, v in zip(primals, tangents)]
    h = step / torch.stack(moved).amax(0).clamp(min=1e-12)  # no primal moves by more than `step` of its size

    def at(sign: float) -> Tensor:
        moved = [p + sign * append_dims(h, p) * v for p, v in zip(primals, tangents)]
        return _evaluate(function, moved)

    output, difference = _evaluate(function, primals), at(1) - at(-1)
    return output, difference / append_dims(2 * h, difference)


def _evaluate(function: Callable[..., Tensor], primals: Sequence[Tensor]) -> Tensor:
    """function(*primals), without a change to the state of the random number generators."""
    device = primals[0].device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        return function(*primals)


def _rms(values: Tensor) -> Tensor:
    """Root mean square of each sample (B,)."""
    return values.reshape(len(values), -1).square().mean(1).sqrt()
