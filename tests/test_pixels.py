"""Pixels of every type become 8 bits with errors below one level, or are refused with a description of the image."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from cm_diffusers.pixels import Extrema, Ranges, extrema, from_array, is_grey, size_of, to_uint8


SHAPE = (5, 7)


def random(seed, *channels, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, (*SHAPE, *channels)).astype(dtype)


def pixels(image, channels=3, scales=None):
    """The values (H, W, channels) after conversion."""
    converted = to_uint8(image, channels, scales)
    assert converted.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(converted).reshape(*size_of(converted), channels).astype(int)


def saved(image, format, **options):
    """The image after saving and opening a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    image = Image.open(buffer)
    image.load()
    return image


def assert_level(got, expected):
    """Assert that values differ from the expected ones by less than one level."""
    assert np.abs(got - expected).max() < 1


def scales_of(*images):
    ranges = Ranges()
    for i, image in enumerate(images):
        ranges.add(f"image {i}", extrema(image))
    return ranges.scales


# --- modes with 8 bits ---------------------------------------------------------------------------------------------


def grey(values):
    return values @ [0.299, 0.587, 0.114]


def on_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def palette_image():
    colours = random(1, 3).reshape(-1, 3)[:20]
    indices = random(2, high=20)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    return image, colours, indices


def eight_bit_images():
    """(name, image, reference RGB values)."""
    luma, rgb, rgba = random(3), random(4, 3), random(5, 4)
    yield "1", Image.fromarray(luma > 99), np.repeat((luma > 99)[..., None] * 255, 3, -1)
    yield "L", Image.fromarray(luma), np.repeat(luma[..., None], 3, -1)
    yield "LA", Image.fromarray(random(6, 2)), on_white(np.repeat(random(6, 2)[..., :1], 3, -1), random(6, 2)[..., 1])
    yield "RGB", Image.fromarray(rgb), rgb
    yield "RGBA", Image.fromarray(rgba), on_white(rgba[..., :3], rgba[..., 3])
    yield "RGBX", Image.fromarray(rgba).convert("RGB").convert("RGBX"), rgba[..., :3]
    image, colours, indices = palette_image()
    yield "P", image, colours[indices]
    seen = indices != 3
    yield "P, transparent", saved(image, "PNG", transparency=3), np.where(seen[..., None], colours[indices], 255)
    yield "PA", image.convert("PA"), colours[indices]
    inks = random(7, 4)
    yield "CMYK", Image.fromarray(inks, "CMYK"), (255.0 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    y, cb, cr = np.moveaxis(random(8, 3).astype(float), -1, 0)
    by_hand = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    yield "YCbCr", Image.fromarray(random(8, 3), "YCbCr"), np.stack(by_hand, -1).clip(0, 255)


CASES = [pytest.param(image, expected, id=name) for name, image, expected in eight_bit_images()]


@pytest.mark.parametrize("image, expected", CASES)
def test_an_image_with_eight_bits_keeps_its_values(image, expected):
    assert extrema(image) is None
    assert np.abs(pixels(image) - expected).max() <= 1
    assert np.abs(pixels(image, 1)[..., 0] - grey(expected)).max() <= 1.5  # colours are rounded before their luma


def test_premultiplied_alpha_is_taken_off_and_laid_over_white():
    image = Image.fromarray(random(0, 4) | np.uint8(128))
    assert np.abs(pixels(image.convert("RGBa")) - pixels(image)).max() <= 1
    image = Image.fromarray(random(0, 2) | np.uint8(128))
    assert np.abs(pixels(image.convert("La")) - pixels(image)).max() <= 1


def test_hues_become_colours():
    image = Image.fromarray(np.uint8([[[0, 255, 255], [85, 255, 255], [170, 255, 255], [9, 0, 80]]]), "HSV")
    assert pixels(image).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [80, 80, 80]]]
    assert pixels(image, 1)[0, 3, 0] == 80


def test_lab_becomes_the_colours_that_it_was_made_from():
    colours = np.uint8([[[0, 0, 0], [255, 255, 255], [128, 128, 128], [200, 80, 60], [60, 160, 90]]])
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    image = ImageCms.profileToProfile(Image.fromarray(colours), rgb, lab, outputMode="LAB")
    assert np.abs(pixels(image) - colours).max() <= 4  # 8-bit L, a, b are coarser
    assert np.abs(pixels(saved(image, "TIFF")) - colours).max() <= 4


# --- deep pixels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
@pytest.mark.parametrize("high, scale", [(65535, 65535), (5000, 65535), (4095, 4095), (255, 255)])
def test_sixteen_bits_of_either_byte_order_have_the_range_of_the_dataset(mode, high, scale):
    values = np.linspace(0, high, 35).round().astype(np.uint16).reshape(SHAPE)
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (7, 5), values.astype(order).tobytes())
    assert extrema(image) == Extrema("uint16", 0, high, True)
    assert_level(pixels(image, 1)[..., 0], values * (255 / scale))
    assert_level(pixels(image, 3), values[..., None] * (255 / scale))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PGM"])
def test_sixteen_bit_files_keep_their_values(format):
    values = random(0, high=65536, dtype=np.uint16)
    if format == "PGM":
        image = Image.open(io.BytesIO(b"P5 7 5 65535\n" + values.astype(">u2").tobytes()))
    else:
        image = saved(Image.fromarray(values), format)
    assert_level(pixels(image, 1)[..., 0], values / 257)


def test_a_big_endian_tiff_keeps_its_values():
    values = random(0, high=65536, dtype=np.uint16)
    image = saved(Image.frombytes("I;16B", (7, 5), values.astype(">u2").tobytes()), "TIFF")
    assert image.mode == "I;16B"
    assert_level(pixels(image, 1)[..., 0], values / 257)


def test_the_transparent_grey_of_a_deep_png_is_white():
    image = Image.fromarray(np.uint16([[0, 300, 65535]]))
    image.info["transparency"] = 300  # Pillow's place for a tRNS chunk
    assert pixels(image, 1)[..., 0].tolist() == [[0, 255, 255]]


@pytest.mark.parametrize("high, scale", [(1, 1), (63, 255), (255, 255), (1000, 4095), (4096, 65535), (65535, 65535)])
@pytest.mark.parametrize("dtype", ["int16", "uint16", ">u2", "int32", ">i4", "uint32", "int64", "float32", "float64"])
def test_whole_numbers_have_the_smallest_range_that_holds_them(dtype, high, scale):
    if high > np.iinfo(np.int16).max and dtype == "int16":
        high, scale = 32767, 65535
    values = random(0, high=high + 1, dtype=dtype)
    values[0, 0] = high
    assert_level(pixels(from_array(values), 1)[..., 0], values * (255 / scale))


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64"])
@pytest.mark.parametrize("scale", [1, 255])
def test_fractions_are_in_0_to_1_or_0_to_255(dtype, scale):
    values = (np.random.default_rng(0).random(SHAPE) * scale).astype(dtype)
    assert_level(pixels(from_array(values), 1)[..., 0], values.astype(float) * (255 / scale))


@pytest.mark.parametrize("high, scale", [(3000, 4095), (65535, 65535)])
def test_fractions_of_larger_ranges(high, scale):
    values = np.random.default_rng(0).random(SHAPE) * (high - 1) + 0.5
    assert_level(pixels(from_array(values), 1)[..., 0], values * (255 / scale))


@pytest.mark.parametrize("values", ["float01", "float255", "int32", "int16"])
def test_tiffs_of_floats_and_of_signed_integers_are_not_black(values):
    values = {
        "float01": np.random.default_rng(0).random(SHAPE, np.float32),
        "float255": np.random.default_rng(0).random(SHAPE, np.float32) * 255,
        "int32": random(0, dtype=np.int32),
        "int16": random(0, dtype=np.int32),  # Pillow opens both in mode I
    }[values]
    scale = 1 if values.max() <= 1 else 255
    assert_level(pixels(saved(Image.fromarray(values), "TIFF"), 1)[..., 0], values * (255 / scale))


def test_what_rounding_adds_to_a_range_is_cut_off():
    values = np.float32([[0, 0.5, 1.00001, -0.000001]])
    assert pixels(from_array(values), 1)[..., 0].tolist() == [[0, 128, 255, 0]]
    assert pixels(from_array(np.float32([[0.5, 255.001]])), 1)[..., 0].tolist() == [[0, 255]]


# --- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, grey", [(1, True), (2, True), (3, False), (4, False)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype, scale", [("uint8", 255), ("uint16", 65535), ("float32", 1), ("float64", 255)])
def test_arrays_of_all_channels_in_either_layout(channels, grey, first, dtype, scale):
    values = np.random.default_rng(0).random((*SHAPE, channels)) * scale
    values = (values.round() if "int" in dtype else values).astype(dtype)
    image = from_array(np.moveaxis(values, -1, 0) if first else values)
    assert is_grey(image) == grey and size_of(image) == SHAPE
    eight = values.astype(float) * (255 / scale)
    if channels in (2, 4):
        eight = on_white(eight[..., :-1], eight[..., -1])
    assert np.abs(pixels(image, 1 if grey else 3) - eight).max() <= 1.5  # alpha is rounded as well


def test_an_array_of_one_plane_and_nested_lists():
    values = random(0)
    assert np.array_equal(pixels(from_array(values), 1)[..., 0], values)
    assert np.array_equal(pixels(from_array(values.tolist()), 1, {"int64": 255})[..., 0], values)
    assert pixels(from_array([[0.0, 0.25], [0.5, 1.0]]), 1)[..., 0].tolist() == [[0, 64], [128, 255]]
    assert np.array_equal(pixels(from_array(random(0, 3).tolist())), random(0, 3))


def test_booleans_are_black_and_white():
    assert pixels(from_array(random(0) > 99), 1)[..., 0].tolist() == ((random(0) > 99) * 255).tolist()


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((5, 6, 7)), r"shape \(5, 6, 7\)"),
        (np.zeros((1, 3, 8, 8)), r"shape \(1, 3, 8, 8\)"),
        (np.zeros((0, 8)), r"shape \(0, 8, 1\)"),
        (np.zeros((4, 4), complex), "complex128"),
        (np.array([["a", "b"]]), "integers or floats"),
        ([[1, None]], "object"),
        ([[1, 2], [3]], "shape"),
    ],
)
def test_what_is_no_image_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_array(values)


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        (np.float32([[0, 0.5, np.nan]]), "float32 values include NaN or infinity"),
        (np.float32([[0, 0.5, np.inf]]), "float32 values include NaN or infinity"),
        (np.float32([[-1, 0.5, 1]]), "float32 values from -1 to 1"),
        (np.int16([[-1000, 0, 3000]]), "int16 values from -1000 to 3000"),
        (np.int32([[0, 65536]]), "int32 values from 0 to 65536"),
        (np.float64([[0.5, 1e6]]), "float64 values from 0.5 to 1e"),
    ],
)
def test_values_that_no_range_holds_are_refused_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=f"{message}.*allowed are 0 to 1, 0 to 255"):
        extrema(from_array(values))
    with pytest.raises(ValueError, match=message):
        to_uint8(from_array(values), 1)


@pytest.mark.parametrize("high", [1.2, 1.99, 256.5, 400.5])
def test_a_little_more_than_a_known_range_is_refused(high):
    with pytest.raises(ValueError, match=rf"from 0 to {high} \(image 1\).*Clip or scale"):
        scales_of(from_array([[0.0, 1.0]]), from_array([[0.5, high]]))


def test_a_mix_of_ranges_is_refused_with_an_image_of_each():
    images = [from_array(np.random.default_rng(i).random(SHAPE) * high) for i, high in enumerate([1, 1, 255, 255])]
    with pytest.raises(ValueError, match=r"in image 0 but 2\d\d.* in image \d: .*0 to 1.*one range"):
        scales_of(*images)


def test_a_dark_image_has_the_range_of_its_dataset():
    dark = Image.fromarray(random(0, high=200, dtype=np.uint16))
    twelve = Image.fromarray(random(0, high=4096, dtype=np.uint16))
    sixteen = Image.fromarray(random(0, high=65536, dtype=np.uint16))
    assert scales_of(dark) == {"uint16": 255}
    assert scales_of(dark, twelve) == {"uint16": 4095}
    assert scales_of(twelve, sixteen, dark) == {"uint16": 65535}
    assert_level(pixels(dark, 1, {"uint16": 4095})[..., 0], np.asarray(dark) * (255 / 4095))


def test_a_black_image_fits_every_range():
    black = from_array(np.zeros(SHAPE))
    assert scales_of(black, from_array(np.full(SHAPE, 0.25))) == {"float64": 1}
    assert scales_of(black, from_array(np.full(SHAPE, 99.5))) == {"float64": 255}
    assert pixels(black, 1, {"float64": 255}).max() == 0


def test_every_type_of_a_dataset_has_a_range_of_its_own():
    images = [
        Image.fromarray(random(0, 3)),
        Image.fromarray(random(1, high=65536, dtype=np.uint16)),
        Image.fromarray(random(2, dtype=np.int32)),
        from_array(np.random.default_rng(3).random(SHAPE, np.float32)),
    ]
    assert scales_of(*images) == {"uint16": 65535, "int32": 255, "float32": 1}


def test_what_was_decided_is_said():
    ranges = Ranges()
    ranges.add("a", extrema(Image.fromarray(np.uint16([[7, 4000]]))))
    assert ranges.describe() == ["uint16 values from 7 to 4000 are read as 0 to 4095."]


@pytest.mark.parametrize(
    "values, scales, message",
    [
        (np.uint16([[0, 5000]]), {"uint16": 4095}, "uint16 values from 0 to 5000.*before are in 0 to 4095"),
        (np.float32([[0.1, 0.9]]), {"float32": 255}, "float32 values from 0.1 to 0.9.*before are in 0 to 255"),
        (np.float32([[0.1, 99]]), {"float32": 1}, "float32 values from 0.1 to 99.*before are in 0 to 1"),
        (np.float32([[0.1, 99]]), {"uint16": 255}, "float32 values.*before hold only uint16"),
        (np.float32([[0.1, 99]]), {}, "float32 values.*before hold only 8-bit"),
    ],
)
def test_an_image_that_the_range_of_its_dataset_does_not_fit_is_refused(values, scales, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(from_array(values), 1, scales)


@pytest.mark.parametrize("seed", range(30))
def test_random_datasets_keep_their_values_to_one_level(seed):
    """Images of several types, dark and bright, with a separate range for each type."""
    rng = np.random.default_rng(seed)
    images, expected = [], []
    for dtype in rng.permutation(["uint8", "uint16", "int32", "int64", "float32", "float64"])[: rng.integers(1, 5)]:
        scale = 255 if dtype == "uint8" else int(rng.choice([255, 4095, 65535]))
        if "float" in dtype:
            scale = int(rng.choice([1, 255]))
        for i in range(rng.integers(1, 4)):
            high = scale if i == 0 else scale * (1 if scale == 1 else rng.uniform(0.05, 1))
            values = rng.random((*rng.integers(5, 9, 2), *([3] if rng.random() < 0.5 else []))) * high
            values.flat[0] = high
            values = values if "float" in dtype else values.round()
            values = values.astype(dtype)
            images.append(from_array(values))
            expected.append(values.astype(float).reshape(*values.shape[:2], -1) * (255 / scale))
    scales = scales_of(*images)
    for image, values in zip(images, expected):
        assert_level(pixels(image, 1 if is_grey(image) else 3, scales), values)
