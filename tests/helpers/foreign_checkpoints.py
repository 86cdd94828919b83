"""Tiny checkpoints in the formats of other projects, written without their code.

Names, shapes and pickles follow those projects. The weights are a function of the names. The projects' own networks
computed the numbers in `DENOISED` with these weights, so a converted network must give the same numbers.
"""

import collections
import contextlib
import io
import pickle
import sys
import types
import zlib

import torch


# For each file, the elements [0, 0, 0, :4] of the denoised `image(...)` at sigma 0.7, or of CTM's jump from 0.7 to
# 0.1. The projects' own networks and preconditionings computed them in float32; those with classes got LABELS.
DENOISED = {
    "ddpmpp": [0.150691, 0.202548, 0.201619, 0.371255],
    "ncsnpp": [0.038468, 0.311233, 0.231941, 0.330213],
    "skip": [0.121545, 0.464338, 0.36866, 0.454504],
    "adm": [0.134986, 0.150584, 0.185876, 0.304216],
    "vp": [0.476897, 0.163211, 0.587687, 0.57401],
    "ve": [0.294836, 0.682411, 0.622814, 0.795935],
    "ect": [0.112402, 0.224917, 0.260093, 0.296932],
    "cd": [0.132206, 0.130142, -0.000361, -0.342216],
    "ct": [0.312478, 0.226763, 0.35966, -0.176563],
    "edm_openai": [0.112391, 0.113366, -0.052774, -0.173971],
    "ctm": [0.244621, 0.125023, 0.237197, 0.23722],
    "ctm_cifar": [0.195879, 0.358035, 0.327747, 0.516191],
    "scm": [0.02898, 0.082158, 0.153634, 0.188766],
    "simo": [0.203381, 0.095473, 0.275415, 0.423087],
}
AUGMENTED = [0.16797, 0.172681, 0.247384, 0.362399]  # "ddpmpp" with the augmentation labels `made_up("augment.")`
IDDPM = [0.562348, 0.527869, 0.657802, 0.970214]  # the network's label for sigma 0.7 is 383
LABELS = [1, 0]
CLASSES = 3


def made_up(name, shape):
    """A tensor of `shape`, as a function of `name`. One-dimensional weights, which belong to norms, are around 1."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return values / (values[0].numel() ** 0.5 if name != "image" else 1)
    return 0.15 * values + name.endswith("weight")


def image(channels, size):
    return made_up("image", (2, channels, size, size))


def layer(name, *shape, bias=True):
    """Shapes of one layer's tensors, by name."""
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


# the networks, as names and shapes


def edm_layout(kind="ddpmpp", classes=0, augment=0, two_times=False, channels=3, out_channels=None):
    """Shapes by name of EDM's network at 8x8: "ddpmpp", "ncsnpp", "skip" (a skip encoder and decoder) or "adm"."""
    out_channels = out_channels or channels
    adm, fourier = kind == "adm", kind in ("ncsnpp", "skip")
    base = 64 if adm else 16
    widths, features, embedding = [base, 2 * base, 2 * base], base * (2 if fourier else 1), 4 * base
    shapes = {}

    def block(name, before, after, resamples=False, attends=False):
        shapes.update(layer(f"{name}.norm0", before) | layer(f"{name}.conv0", after, before, 3, 3))
        for affine in ("affine", "affine_s")[: 1 + two_times]:
            shapes.update(layer(f"{name}.{affine}", after * (1 + adm), embedding))
        shapes.update(layer(f"{name}.norm1", after) | layer(f"{name}.conv1", after, after, 3, 3))
        if before != after or resamples and not adm:
            shapes.update(layer(f"{name}.skip", after, before, 1, 1))
        if resamples:
            filtered(f"{name}.conv0"), filtered(f"{name}.skip")
        if attends:
            shapes.update(layer(f"{name}.norm2", after) | layer(f"{name}.qkv", 3 * after, after, 1, 1))
            shapes.update(layer(f"{name}.proj", after, after, 1, 1))

    def filtered(name):
        shapes[f"{name}.resample_filter"] = (1, 1, 4, 4) if fourier else (1, 1, 2, 2)

    if fourier:
        shapes["map_noise.freqs"] = (features // 2,)
    for suffix in ("", "_s")[: 1 + two_times]:
        shapes |= layer(f"map_layer0{suffix}", embedding, features) | layer(
            f"map_layer1{suffix}", embedding, embedding
        )
    if classes:
        shapes |= layer("map_label", embedding if adm else features, classes, bias=not adm)
    if augment:
        shapes |= layer("map_augment", features, augment, bias=False)
    shapes |= layer("enc.8x8_conv", base, channels, 3, 3)
    skips, side, width = [base], channels, base
    for r, after in zip((8, 4, 2), widths):
        if r < 8:
            block(f"enc.{r}x{r}_down", width, width, resamples=True)
            skips.append(width)
            if kind == "ncsnpp":
                shapes |= layer(f"enc.{r}x{r}_aux_residual", width, side, 3, 3)
                filtered(f"enc.{r}x{r}_aux_residual")
                side = width
            if kind == "skip":
                filtered(f"enc.{r}x{r}_aux_down")
                shapes |= layer(f"enc.{r}x{r}_aux_skip", width, side, 1, 1)
        block(f"enc.{r}x{r}_block0", width, after, attends=r == 4)
        skips.append(after)
        width = after
    block("dec.2x2_in0", width, width, attends=True)
    block("dec.2x2_in1", width, width)
    for r, after in zip((2, 4, 8), reversed(widths)):
        if r > 2:
            block(f"dec.{r}x{r}_up", width, width, resamples=True)
        for i in range(2):
            block(f"dec.{r}x{r}_block{i}", width + skips.pop(), after, attends=r == 4 and (adm or i == 1))
            width = after
        if kind == "skip" and r > 2:
            filtered(f"dec.{r}x{r}_aux_up")
        if kind == "skip" or r == 8 and not adm:
            shapes |= layer(f"dec.{r}x{r}_aux_norm", width) | layer(f"dec.{r}x{r}_aux_conv", out_channels, width, 3, 3)
    return shapes | (layer("out_norm", base) | layer("out_conv", out_channels, base, 3, 3) if adm else {})


def adm_layout(widths=(32, 64), classes=0, two_times=False, scale_shift=True, resnets=True):
    """Shapes by name of OpenAI's network at 8x8 with attention at 4x4, or of CTM's with `two_times`."""
    embedding, shapes = 4 * widths[0], {}

    def block(name, before, after, attends=False):
        shapes.update(layer(f"{name}.in_layers.0", before) | layer(f"{name}.in_layers.2", after, before, 3, 3))
        for affine in ("emb_layers", "emb_layers_s")[: 1 + two_times]:
            shapes.update(layer(f"{name}.{affine}.1", after * (1 + scale_shift), embedding))
        shapes.update(layer(f"{name}.out_layers.0", after) | layer(f"{name}.out_layers.3", after, after, 3, 3))
        if before != after:
            shapes.update(layer(f"{name}.skip_connection", after, before, 1, 1))
        if attends:
            name = f"{name[:-1]}1"
            shapes.update(layer(f"{name}.norm", after) | layer(f"{name}.qkv", 3 * after, after, 1, 1))
            shapes.update(layer(f"{name}.proj_out", after, after, 1, 1))

    for suffix in ("", "_s")[: 1 + two_times]:
        shapes |= layer(f"time_embed{suffix}.0", embedding, widths[0])
        shapes |= layer(f"time_embed{suffix}.2", embedding, embedding)
    if classes:
        shapes |= layer("label_emb", classes, embedding, bias=False)
    high, low = widths
    shapes |= layer("input_blocks.0.0", high, 3, 3, 3)
    block("input_blocks.1.0", high, high)
    block("input_blocks.2.0", high, high) if resnets else shapes.update(layer("input_blocks.2.0.op", high, high, 3, 3))
    block("input_blocks.3.0", high, low, attends=True)
    block("middle_block.0", low, low, attends=True)
    block("middle_block.2", low, low)
    block("output_blocks.0.0", 2 * low, low, attends=True)
    block("output_blocks.1.0", low + high, low, attends=True)
    block("output_blocks.1.2", low, low) if resnets else shapes.update(layer("output_blocks.1.2.conv", low, low, 3, 3))
    block("output_blocks.2.0", low + high, high)
    block("output_blocks.3.0", 2 * high, high)
    return shapes | layer("out.0", high) | layer("out.2", 3, high, 3, 3)


def scm_layout(base=16, time=8):
    """Shapes by name of the MNIST sCM, with two resolutions."""
    shapes = {"time_embedding.freqs": (time // 2,)}

    def conv(name, before, after, kernel=1):
        shapes.update(layer(f"{name}.conv", after, before, kernel, kernel) | layer(f"{name}.gn", after))

    def unit(name, before, after, halves=False):
        seen, half = before if halves else before // 2, after // 2
        middle = half if halves else seen
        shapes.update(layer(f"{name}.branch1.0", seen, 1, 3, 3) | layer(f"{name}.branch1.1", seen))
        conv(f"{name}.branch1.2", seen, half)
        conv(f"{name}.branch2.0", seen, middle)
        shapes.update(layer(f"{name}.branch2.1", middle, 1, 3, 3) | layer(f"{name}.branch2.2", middle))
        conv(f"{name}.branch2.3", middle, half)

    conv("init_conv", 1, base, 3)
    for level, (above, below) in enumerate([(base, 2 * base), (2 * base, 4 * base)]):
        for kind, place, start in (("encoder", level, above), ("decoder", 1 - level, below)):
            name = f"{kind}_blocks.{place}"
            for i in range(4):
                unit(f"{name}.conv0.{i}", start, start if i < 3 else below // 2)
            shapes |= layer(f"{name}.time_mlp.mlp.0", below, time) | layer(f"{name}.time_mlp.mlp.2", below // 2, below)
            unit(f"{name}.conv1", below // 2, *((below, True) if kind == "encoder" else (above // 2,)))
    for i in range(3):
        unit(f"mid_block.{i}", 4 * base, 4 * base if i < 2 else 2 * base)
    return shapes | layer("logvar_linear", 1, time) | layer("final_conv", 1, base // 2, 1, 1)


def simo_layout(base=32, channels=1):
    """Shapes by name of cloneofsimo's consistency model."""
    shapes = layer("down.0", base, channels, 3, 3) | layer("up.3", 2 * base, 2 * base, 3, 3)
    widths = {"down.1": (1, 1), "down.2": (1, 2), "down.3": (2, 2), "mid": (2, 2)}
    for name, (before, after) in (widths | {"up.0": (2, 2), "up.1": (4, 1), "up.2": (1, 1)}).items():
        for i, width in ((0, before), (3, after)):
            shapes |= layer(f"{name}.{i}", width * base) | layer(f"{name}.{i + 2}", after * base, width * base, 3, 3)
    for i, width in enumerate((1, 1, 2, 2)):
        shapes |= layer(f"time_downs.{i}", width * base, 2 * base)
    return shapes | layer("last", channels, 2 * base + channels, 3, 3)


def tensors(layout, prefix=""):
    """Tensors for a layout, by prefixed name: fixed filters and frequencies, and made-up weights."""
    values = {}
    for name, shape in layout.items():
        if name.endswith("resample_filter"):
            taps = torch.tensor([1.0, 3, 3, 1] if shape[-1] == 4 else [1.0, 1])
            values[prefix + name] = taps.outer(taps)[None, None] / taps.sum() ** 2
        elif name == "time_embedding.freqs":
            values[prefix + name] = 10 ** torch.linspace(0, -1, shape[0])
        else:
            values[prefix + name] = made_up(name, shape)
    return values


# pickles like EDM's, which hold the source text of each module and name the function that rebuilds the module


class Persistent:
    """Pickled like a module of EDM's code: a function's name, a module's source text, a class name and a state."""

    def __init__(self, kind, source="raise RuntimeError('this text was run')", **state):
        self.kind, self.source, self.state = kind, source, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.kind, "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def module(values, kind="Layer", **settings):
    """Nest tensors with dotted names into `Persistent` modules; filters and frequencies become buffers."""
    own, children = {}, collections.defaultdict(dict)
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            children[head][rest] = value
        else:
            own[head] = value
    buffers = {name: value for name, value in own.items() if name in ("resample_filter", "freqs", "u")}
    parameters = {name: torch.nn.Parameter(value) for name, value in own.items() if name not in buffers}
    nested = {name: module(part, settings.pop(f"{name}_kind", "Layer")) for name, part in children.items()}
    return Persistent(kind, _parameters=parameters, _buffers=buffers, _modules=nested, training=False, **settings)


def edm_content(values, kind="EDMPrecond", loss="EDMLoss", **settings):
    """The content of an EDM snapshot whose network `ema` has the tensors `values`."""
    settings = {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5} | settings
    network = module(values, kind, **settings)
    network.state["_modules"]["model"].state["_init_kwargs"] = {"dropout": 0.13}
    return {"ema": network, "loss_fn": Persistent(loss, P_mean=-1.2), "augment_pipe": None, "dataset_kwargs": {}}


@contextlib.contextmanager
def their_modules():
    """Context that provides the modules which an EDM pickle names, so that it can be written."""
    names = ("torch_utils", "torch_utils.persistence")
    persistence = types.ModuleType(names[1])

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("this was called")

    _reconstruct_persistent_obj.__module__ = names[1]
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {names[0]: types.ModuleType(names[0]), names[1]: persistence}
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def dump(content, path):
    """Pickle `content` to `path` as EDM's code does; returns `path`."""
    with their_modules(), open(path, "wb") as file:
        pickle.dump(content, file)
    return path


def save(content, path, **kwargs):
    """Write `content` to `path` by torch.save; returns `path`."""
    with their_modules():
        buffer = io.BytesIO()
        torch.save(content, buffer, **kwargs)
    path.write_bytes(buffer.getvalue())
    return path


def write(case, folder):
    """Write the checkpoint of `case`, a key of `DENOISED`, under its project's file name.

    Returns the path and the options for its conversion.
    """
    adm_options = {"image_size": 8}
    if case in ("cd", "ct", "edm_openai"):
        layouts = {"cd": adm_layout(classes=CLASSES), "ct": adm_layout(resnets=False)}
        layouts["edm_openai"] = adm_layout(scale_shift=False)
        name = {"cd": "cd_imagenet64_l2.pt", "ct": "ct_bedroom256.pt", "edm_openai": "edm_bedroom256_ema.pt"}[case]
        return save(tensors(layouts[case]), folder / name), adm_options | {"num_head_channels": 16}
    if case == "ctm":
        layout = adm_layout(widths=(128, 128), classes=CLASSES, two_times=True)
        return save(tensors(layout), folder / "ema_0.999_049000.pt"), adm_options
    if case == "ctm_cifar":
        layout = edm_layout(classes=CLASSES, two_times=True)
        return save(tensors(layout, "model."), folder / "model049000.pt"), {}
    if case == "scm":
        return save(tensors(scm_layout()), folder / "model_consistency_199.pt"), {}
    if case == "simo":
        return save(tensors(simo_layout()), folder / "ct_mnist.pth"), {"image_size": 8}
    settings = {
        "vp": {"kind": "VPPrecond", "beta_d": 19.9, "beta_min": 0.1, "M": 1000, "sigma_max": 152.0},
        "ve": {"kind": "VEPrecond", "sigma_min": 0.02, "sigma_max": 100},
        "ect": {"kind": "ECMPrecond", "sigma_min": 0.003},
    }
    content = edm_content(edm_tensors(case), **settings.get(case, {}))
    return dump(content, folder / f"network-snapshot-{case}.pkl"), {}


def edm_tensors(case="ddpmpp"):
    """The tensors of an EDM file, by name."""
    layouts = {
        "ddpmpp": edm_layout(classes=CLASSES, augment=9),
        "ncsnpp": edm_layout("ncsnpp"),
        "skip": edm_layout("skip"),
        "adm": edm_layout("adm", classes=CLASSES),
        "ve": edm_layout("ncsnpp"),
    }
    return tensors(layouts.get(case) or edm_layout(), "model.")
