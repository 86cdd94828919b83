"""Checkpoints of each family, written by a test helper, become the right pipelines with the right numbers."""

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline, UNet2DModel
from safetensors.torch import save_file

import cm_diffusers
from cm_diffusers import EDMUNet2DModel
from cm_diffusers.convert import Options, convert_checkpoint
from cm_diffusers.convert.accounting import ordered_qkv
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.engine.saved.start import denoiser_of, load_pipeline
from cm_diffusers.objectives import OBJECTIVES, ModelSpec
from tests.helpers import foreign_checkpoints as foreign
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import run


CASES = list(foreign.DENOISED)
EXPECTED = {  # family, pipeline and settings of its scheduler
    "ddpmpp": ("edm", "DenoisingPipeline", {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}),
    "ncsnpp": ("edm", "DenoisingPipeline", {}),
    "skip": ("edm", "DenoisingPipeline", {}),
    "adm": ("edm", "DenoisingPipeline", {}),
    "vp": ("edm", "DenoisingPipeline", {"sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 80.0}),
    "ve": ("edm", "DenoisingPipeline", {"sigma_data": 1.0, "sigma_min": 0.02, "sigma_max": 80.0}),
    "ect": ("ect", "ConsistencyPipeline", {"sigma_min": 0.003, "renoise": "full", "clip_denoised": False}),
    "cd": ("openai", "ConsistencyModelPipeline", {"num_train_timesteps": 40, "sigma_min": 0.002}),
    "ct": ("openai", "ConsistencyModelPipeline", {}),
    "edm_openai": ("openai", "DenoisingPipeline", {"sigma_min": 0.002, "sigma_data": 0.5}),
    "ctm": ("ctm", "CTMPipeline", {"num_train_timesteps": 40, "gamma_rule": "official", "sigma_min": 0.002}),
    "ctm_cifar": ("ctm", "CTMPipeline", {"num_train_timesteps": 18, "gamma_rule": "official"}),
    "scm": (
        "scm",
        "TrigFlowPipeline",
        {"solver": "consistency", "sigma_data": 1.0, "sigma_min": 0.004, "sigma_max": 160.0},
    ),
    "simo": ("simo", "ConsistencyPipeline", {"sigma_min": 0.002, "clip_denoised": False, "renoise": "floor"}),
}


SAMPLED = {  # settings with which their authors sample
    **dict.fromkeys(("ddpmpp", "ncsnpp", "skip", "adm", "vp", "ve"), "--num_inference_steps 18"),
    **dict.fromkeys(("cd", "ct", "ctm", "ctm_cifar"), "--num_inference_steps 1"),
    **{"ect": "--sigmas 80 0.821", "edm_openai": "--num_inference_steps 40", "scm": "--num_inference_steps 2"},
    "simo": "--sigmas 80 2",
}


def convert(path, **options):
    return convert_checkpoint(path, Options(**options))


def denoised(pipeline, case):
    """The pipeline's denoised image for the input of the numbers in `foreign`."""
    if type(pipeline) is ConsistencyModelPipeline:
        pipeline = cm_diffusers.ConsistencyPipeline(**pipeline.components)
    channels, size = pipeline.sample_shape[:2]
    x, sigma = foreign.image(channels, size), torch.tensor([0.7, 0.7])
    labels = None if pipeline.num_classes is None else torch.tensor(foreign.LABELS)
    denoiser = denoiser_of(pipeline)
    with torch.no_grad():
        if case.startswith("ctm"):
            return denoiser.jump(x, sigma, torch.tensor([0.1, 0.1]), of_classes(labels))
        if case == "scm":  # its images have half the size
            return denoiser(2 * x, 2 * sigma) / 2
        return denoiser(x, sigma, of_classes(labels))


def check_numbers(pipeline, case):
    expected = torch.tensor(foreign.DENOISED[case])
    torch.testing.assert_close(denoised(pipeline, case)[0, 0, 0, :4], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_file_becomes_a_pipeline_that_gives_the_same_numbers(case, tmp_path):
    path, options = foreign.write(case, tmp_path)
    converted = convert(path, **options)
    family, kind, settings = EXPECTED[case]
    assert (converted.family, type(converted.result).__name__) == (family, kind)
    assert {name: converted.result.scheduler.config[name] for name in settings} == settings
    assert converted.result.unet.config.num_class_embeds == (
        foreign.CLASSES if case in ("ddpmpp", "adm", "cd", "ctm", "ctm_cifar") else None
    )
    converted.result.save_pretrained(tmp_path / "saved")
    pipeline = load_pipeline(str(tmp_path / "saved"))
    pipeline.set_progress_bar_config(disable=True)
    check_numbers(pipeline, case)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="pt", generator=torch.Generator()).images
    assert images.shape == (2, *pipeline.sample_shape) and images.isfinite().all()
    assert converted.sampling == SAMPLED[case]


def test_dropout_and_augmentation_labels_are_carried_over(tmp_path):
    path, _ = foreign.write("ddpmpp", tmp_path)
    network = convert(path).result.unet
    assert network.config.dropout == 0.13
    labels, x, sigma = torch.tensor(foreign.LABELS), foreign.image(3, 8), torch.tensor(0.7)
    norm = (sigma**2 + 0.25).sqrt()
    with torch.no_grad():
        augment = foreign.made_up("augment.", (2, 9))
        output = network(x / norm, 250 * sigma.log(), labels, augment).sample
    result = 0.25 / norm**2 * x + 0.5 * sigma / norm * output
    torch.testing.assert_close(result[0, 0, 0, :4], torch.tensor(foreign.AUGMENTED), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kwargs", [{"dropout": 0.13, "label_dropout": 0.1}, {"dropout": 0.2}, {}])
def test_what_training_goes_on_with_is_that_of_the_file(kwargs, tmp_path):
    content = foreign.edm_content(foreign.edm_tensors())
    content["ema"].state["_modules"]["model"].state["_init_kwargs"] = kwargs
    config = convert(foreign.dump(content, tmp_path / "a.pkl")).result.unet.config
    for name in ("dropout", "label_dropout"):
        assert config[name] == kwargs.get(name, 0.0)


def test_a_stock_network_needs_nothing_but_diffusers(tmp_path):
    path, options = foreign.write("cd", tmp_path)
    result = convert(path, **options, num_train_timesteps=201).result
    assert type(result) is ConsistencyModelPipeline and type(result.unet) is UNet2DModel
    result.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.py"))
    assert DiffusionPipeline.from_pretrained(tmp_path / "saved").scheduler.config.num_train_timesteps == 201


def test_a_network_of_iddpm_comes_alone(tmp_path):
    values = foreign.tensors(foreign.edm_layout("adm", out_channels=6), "model.") | {"u": torch.zeros(1001)}
    converted = convert(foreign.dump(foreign.edm_content(values, "iDDPMPrecond", M=1000), tmp_path / "a.pkl"))
    assert type(converted.result) is EDMUNet2DModel and any("u" in note for note in converted.notes)
    x = foreign.image(3, 8)
    with torch.no_grad():
        noise = converted.result(x / 1.49**0.5, 383.0).sample[:, :3]
    torch.testing.assert_close((x - 0.7 * noise)[0, 0, 0, :4], torch.tensor(foreign.IDDPM), rtol=0, atol=5e-6)


# --- the order of queries, keys and values


def test_orders_of_qkv_by_hand():
    rows = [f"{part}{head}{channel}" for part in "qkv" for head in "01" for channel in "ab"]
    number = {name: float(i) for i, name in enumerate(rows)}
    legacy = [f"{part}{head}{channel}" for head in "01" for part in "qkv" for channel in "ab"]
    interleaved = [f"{part}{head}{channel}" for head in "01" for channel in "ab" for part in "qkv"]
    for order, names in (("new", rows), ("legacy", legacy), ("interleaved", interleaved)):
        tensor = torch.tensor([number[name] for name in names])
        assert ordered_qkv(tensor, 2, order).tolist() == list(range(12)), order
        assert ordered_qkv(tensor[:, None].repeat(1, 3), 2, order)[:, 2].tolist() == list(range(12)), order


@pytest.mark.parametrize("case", ["cd", "ctm"])
def test_files_of_the_legacy_order_give_the_same_numbers_with_the_flag(case, tmp_path):
    path, options = foreign.write(case, tmp_path)
    values = torch.load(path, weights_only=True)
    head_dim = options.get("num_head_channels", 64)
    for name in [name for name in values if ".qkv." in name]:
        tensor = values[name]
        tensor = tensor.reshape(3, -1, head_dim, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
        values[name] = tensor[..., 0] if tensor.ndim == 4 else tensor  # one-dimensional 1x1 convolutions as well
    foreign.save(values, path)
    check_numbers(convert(path, **options, qkv_order="legacy").result, case)
    wrong = denoised(convert(path, **options).result, case)[0, 0, 0, :4] - torch.tensor(foreign.DENOISED[case])
    assert wrong.abs().max() > 1e-3


# --- which weights


@pytest.fixture
def training_state(tmp_path):
    """A training state that holds online weights only."""
    values = {name: 2 * value if "resample" not in name else value for name, value in foreign.edm_tensors().items()}
    content = {"net": foreign.edm_content(values)["ema"], "optimizer_state": {"state": {}, "param_groups": []}}
    return foreign.save(content, tmp_path / "training-state-000128.pt")


def first_bias(converted):
    return converted.result.unet.conv_in.bias[0].item()


def test_weights_are_chosen(tmp_path, training_state):
    ema, _ = foreign.write("ddpmpp", tmp_path)
    assert first_bias(convert(training_state, weights="online")) == 2 * first_bias(convert(ema, weights="ema"))
    assert first_bias(convert(training_state)) == 2 * first_bias(convert(ema))
    assert "weights: online" in convert(training_state).notes
    with pytest.raises(ValueError, match="holds no online weights, only ema"):
        convert(ema, weights="online")
    values = foreign.tensors(foreign.simo_layout())
    both = foreign.save({"ema": values, "model": {n: 2 * v for n, v in values.items()}}, tmp_path / "both.pt")
    assert first_bias(convert(both, weights="online")) == 2 * first_bias(convert(both))


def test_a_file_of_one_set_of_weights_leaves_no_choice(tmp_path):
    path, _ = foreign.write("simo", tmp_path)
    with pytest.raises(ValueError, match="one set of weights"):
        convert(path, weights="online")


def test_weights_alone_say_less_and_the_notes_say_what_is_assumed(tmp_path):
    values = {f"module.{name}": value for name, value in foreign.edm_tensors("ect").items()}
    save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "weights.safetensors")
    converted = convert(tmp_path / "weights.safetensors", kind="consistency")
    assert converted.family == "ect" and converted.result.scheduler.config.sigma_min == 0.003
    check_numbers(converted.result, "ect")
    assert {"sigma_data", "sigma_min"} <= {note.split()[1] for note in converted.notes if note.startswith("assumed")}
    assert convert(tmp_path / "weights.safetensors").family == "edm"


def test_what_is_no_tensor_is_left_out_with_a_note(tmp_path):
    values = foreign.tensors(foreign.simo_layout()) | {"step": 3, "name": "a run"}
    notes = convert(foreign.save({"ema": values}, tmp_path / "a.pt")).notes
    assert notes[:3] == ["weights: ema", *(f"left out: {name}, which is not a tensor" for name in ("step", "name"))]


def test_assumptions_are_noted(tmp_path):
    path, _ = foreign.write("ctm", tmp_path)
    notes = " ".join(convert(path).notes)
    for text in ("--num_head_channels 64", "--image_size 64", "--qkv_order new", "--num_train_timesteps 40"):
        assert text in notes


@pytest.mark.parametrize("case, kind", [("cd", "diffusion"), ("edm_openai", "consistency"), ("scm", "diffusion")])
def test_kind_decides_where_networks_are_the_same(case, kind, tmp_path):
    path, options = foreign.write(case, tmp_path)
    converted = convert(path, **options, kind=kind)
    result = converted.result
    assert converted.sampling == f"--num_inference_steps { ({'cd': 40, 'edm_openai': 1, 'scm': 18}[case]) }"
    if case == "scm":
        assert result.scheduler.config.solver == "heun"
        result.scheduler.set_timesteps(18)
        assert result.scheduler.sigmas[[0, -2]].tolist() == pytest.approx([160, 0.004])  # for images of twice the size
    else:
        assert type(result).__name__ == {"diffusion": "DenoisingPipeline"}.get(kind, "ConsistencyModelPipeline")


def test_cdm_is_told_by_its_loss(tmp_path):
    content = foreign.edm_content(foreign.edm_tensors(), loss="MartingaleLoss")
    assert convert(foreign.dump(content, tmp_path / "a.pkl")).family == "cdm"


# --- refused files


@pytest.mark.parametrize("case", ["cd", "ct"])
def test_a_consistency_model_is_no_ctm(case, tmp_path):
    path, options = foreign.write(case, tmp_path)
    with pytest.raises(ValueError, match="not of the family ctm.*CD or CT.*--family openai.*not CTM models"):
        convert(path, **options, family="ctm")
    assert convert(path, **options, family="openai").family == "openai"


def test_an_unknown_file_is_told_what_is_known(tmp_path):
    path = foreign.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pt")
    with pytest.raises(
        ValueError, match=r"belongs to no known family: it holds conv1.weight. Known are openai \(.*simo"
    ):
        convert(path)
    with pytest.raises(ValueError, match="no tensors at all"):
        convert(foreign.save({}, tmp_path / "empty.pt"))
    with pytest.raises(ValueError, match="no weights but a list"):
        convert(foreign.save([1], tmp_path / "list.pt"))


@pytest.mark.parametrize("case", ["ddpmpp", "cd", "ctm", "scm", "simo"])
def test_tensors_must_add_up(case, tmp_path):
    path, options = foreign.write(case, tmp_path)
    if path.suffix == ".pkl":
        values, options = foreign.edm_tensors(), options | {"kind": "diffusion"}
        path = tmp_path / "weights.pt"
    else:
        values = torch.load(path, weights_only=True)
    names = [name for name in values if name.endswith(".bias")]
    gone, bent, spoilt = names[1], names[2], names[3]
    for change, message in (
        (lambda v: v.pop(gone), f"1 missing: {gone}"),
        (lambda v: v.update({"extra.weight": torch.zeros(1)}), "1 unexpected: extra.weight"),
        (lambda v: v.update({bent: torch.zeros(5, 1)}), r"1 of another shape: \S+ \(5, 1\) for"),
        (lambda v: v.update({spoilt: torch.full_like(v[spoilt], torch.nan)}), "1 not finite"),
    ):
        changed = dict(values)
        change(changed)
        with pytest.raises(ValueError, match=f"don't add up. {message}") as error:
            convert(foreign.save(changed, path), **options)
        assert "Nothing was written" in str(error.value)


@pytest.mark.parametrize("case", ["ddpmpp", "cd", "scm", "simo"])
def test_shapes_that_say_nothing_are_refused(case, tmp_path):
    """The shapes from which the converter reads the network's size."""
    path, options = foreign.write(case, tmp_path)
    values, options = (
        (foreign.edm_tensors(), {}) if case == "ddpmpp" else (torch.load(path, weights_only=True), options)
    )
    known = ("enc.8x8_conv", "enc.4x4_block0.conv1", "map_layer0", "dec.8x8_aux_conv", "map_label")
    known += ("time_embed.0", "input_blocks.0.0", "output_blocks.1.0.out_layers.3", "label_emb", "out.2")
    known += ("init_conv.conv", "encoder_blocks.1.conv1.branch1.0", "logvar_linear", "down.0", "last")
    names = [name for name in values if name.removeprefix("model.").removesuffix(".weight") in known]
    assert len(names) >= 2
    for name in names:
        for shape in ((), (0,), (3,), (1, 0, 1, 1)):
            with pytest.raises(ValueError):
                convert(foreign.save(values | {name: torch.zeros(shape)}, tmp_path / "a.pt"), **options)


def test_many_problems_are_counted_and_some_shown(tmp_path):
    values, extra = foreign.tensors(foreign.simo_layout()), torch.zeros(1)
    values |= {f"extra.{i}": extra for i in range(100_000)}
    with pytest.raises(ValueError, match="100000 unexpected: extra.0, .* and 99992 more") as error:
        convert(foreign.save(values, tmp_path / "a.pt"))
    assert len(str(error.value)) < 1000


def test_another_filter_is_not_taken_for_a_known_one(tmp_path):
    values = foreign.edm_tensors("ncsnpp")
    name = "model.enc.4x4_down.conv0.resample_filter"
    values[name] = values[name].flip(3) * torch.tensor([1.0, 2, 1, 1])
    with pytest.raises(ValueError, match=f"1 unexpected: {name}"):
        convert(foreign.dump(foreign.edm_content(values), tmp_path / "a.pkl"))
    del values[name]
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        convert(foreign.dump(foreign.edm_content(values), tmp_path / "a.pkl"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "EDM2Precond"}, "EDM2Precond; known are EDMPrecond"),
        ({"kind": "VPPrecond", "beta_d": 19.1, "beta_min": 0.1, "M": 1000}, "beta_d 19.1; only 19.9"),
        ({"sigma_data": "0.5"}, "sigma_data '0.5', which must be a number"),
        ({"sigma_min": float("nan")}, "sigma_min nan, which must be a number"),
    ],
)
def test_unknown_settings_of_a_pickle_are_refused(settings, message, tmp_path):
    path = foreign.dump(foreign.edm_content(foreign.edm_tensors(), **settings), tmp_path / "a.pkl")
    with pytest.raises(ValueError, match=message):
        convert(path)


@pytest.mark.parametrize(
    "case, options, message",
    [
        ("cd", {"image_size": 8, "num_head_channels": 24}, "num_head_channels 24 doesn't divide 64"),
        ("cd", {"image_size": 7, "num_head_channels": 16}, "image_size 7 can't be halved 1 times"),
        ("ddpmpp", {"image_size": 8}, "image_size does not apply to"),
        ("ddpmpp", {"kind": "consistency"}, "kind does not apply to"),
        ("simo", {"num_head_channels": 8}, "num_head_channels does not apply to"),
    ],
)
def test_options_that_are_wrong_or_idle_are_refused(case, options, message, tmp_path):
    path, _ = foreign.write(case, tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(path, **options)


def test_a_narrow_network_of_two_times_is_refused(tmp_path):
    values = foreign.tensors(foreign.adm_layout(two_times=True))
    with pytest.raises(ValueError, match="fewer than 128 channels"):
        convert(foreign.save(values, tmp_path / "a.pt"), num_head_channels=16)


# --- converted models in training


def test_a_converted_model_is_a_teacher(tmp_path):
    """It is distilled into networks with one time and with two, in a step or two, and loaded again."""
    layout = foreign.edm_layout(classes=10, channels=1)
    path = foreign.dump(foreign.edm_content(foreign.tensors(layout, "model.")), tmp_path / "edm.pkl")
    convert(path).result.save_pretrained(tmp_path / "teacher")
    for method in ("ecd", "ctm"):
        settings = {"pretrained_teacher_model": str(tmp_path / "teacher"), "max_train_steps": 1}
        folder = run(tmp_path / method, method, **settings, model_preset=None)
        pipeline = load_pipeline(str(folder / "pipeline"))
        assert pipeline(output_type="pt").images.isfinite().all()
        kind = getattr(pipeline.unet, "network", pipeline.unet)
        assert type(kind) is EDMUNet2DModel and kind.config.preconditioning == "edm"


def test_a_converted_trajectory_model_is_trained_as_it_is(tmp_path):
    path, options = foreign.write("ctm", tmp_path)
    network = convert(path, **options).result.unet
    assert OBJECTIVES["ctm"].adapt(network, ModelSpec(0.5)) is network


# --- the script


def run_script(*words):
    script = load_script("convert")
    script.convert(script.parse_args([str(word) for word in words]))


def test_the_script_says_what_it_found_and_what_comes_next(tmp_path, capsys):
    path, _ = foreign.write("ect", tmp_path)
    run_script(path, tmp_path / "out", "--ema", "--family", "ect")
    printed = capsys.readouterr().out
    assert (
        "a consistency model of ECT's code" in printed and "sigma_min 0.003" in printed and "classes: none" in printed
    )
    assert f"training/sample.py --pretrained_model_name_or_path {tmp_path / 'out'} --sigmas 80 0.821" in printed
    pipeline = cm_diffusers.ConsistencyPipeline.from_pretrained(tmp_path / "out")
    check_numbers(pipeline, "ect")


def test_the_script_saves_a_network_alone(tmp_path, capsys):
    values = foreign.tensors(foreign.edm_layout("adm", out_channels=6), "model.")
    path = foreign.dump(foreign.edm_content(values, "iDDPMPrecond"), tmp_path / "a.pkl")
    run_script(path, tmp_path / "out")
    assert "EDMUNet2DModel.from_pretrained" in capsys.readouterr().out
    assert EDMUNet2DModel.from_pretrained(tmp_path / "out").config.out_channels == 6
