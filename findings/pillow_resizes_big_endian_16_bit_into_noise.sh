#!/usr/bin/env bash
# Pillow 12.3.0 resizes a 16-bit grey image from a big-endian TIFF file (mode I;16B) into noise, without an error.
#
# The file opens with the right values, and Image.convert("I") keeps them. Every filter that computes sums of pixels
# (BOX when it shrinks, BILINEAR, HAMMING, BICUBIC, LANCZOS) returns pixels of a wrong order of magnitude. So do
# thumbnail() and ImageOps.fit(), which use these filters. NEAREST is right. A little-endian file (I;16) with the same
# values is right to one level (BICUBIC rounds down there). Microscopes, astronomy and ImageJ write big-endian TIFF.
#
# Our workaround: cm_diffusers/pixels.py converts every image to 8 bits before any resizing (tests/test_pixels.py).
# Output seen (2026-11-28, Python 3.11, Linux x86-64):
#   I;16B opens right: True, convert('I') right: True
#   largest error of 65535, little-endian: BOX 0.8 BILINEAR 0.7 HAMMING 0.9 BICUBIC 0.7 LANCZOS 0.8 NEAREST 0.0
#   largest error of 65535, big-endian: BOX 49407.2 BILINEAR 58806.0 HAMMING 56479.4 BICUBIC 54240.7 LANCZOS 57685.3 NEAREST 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --disable-pip-version-check pillow==12.3.0 numpy==2.4.6
cd "$work"
"$work/env/bin/python" - <<'PY'
import numpy as np
from PIL import Image

ramp = np.linspace(1000, 60000, 256).reshape(16, 16).astype(np.uint16)
Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes()).save("big.tif")
Image.fromarray(ramp).save("little.tif")
big, little = Image.open("big.tif"), Image.open("little.tif")
assert (big.mode, little.mode) == ("I;16B", "I;16"), (big.mode, little.mode)
right, kept = np.array_equal(np.asarray(big), ramp), np.array_equal(np.asarray(big.convert("I")), ramp)
print(f"I;16B opens right: {right}, convert('I') right: {kept}")
assert right and kept

truth = Image.fromarray(ramp.astype(np.float32))
errors = {"little": {}, "big": {}}
for name in ("BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS", "NEAREST"):
    how = getattr(Image.Resampling, name)
    for which, image in (("little", little), ("big", big)):
        seen = np.asarray(image.resize((8, 8), how)).astype(float)
        errors[which][name] = float(np.abs(seen - np.asarray(truth.resize((8, 8), how))).max())
for which, found in errors.items():
    print(f"largest error of 65535, {which}-endian:", *(f"{name} {error:.1f}" for name, error in found.items()))
assert all(error < 1 for error in errors["little"].values()), "little-endian images changed"
assert errors["big"].pop("NEAREST") == 0
assert all(error > 10_000 for error in errors["big"].values()), "big-endian images are resized rightly now"
PY
