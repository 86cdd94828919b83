#!/usr/bin/env bash
# torch 2.13.0 + onnxscript 0.7.2: torch.onnx.export fails on x.chunk(2) along a dynamic dimension.
#
# `chunk` along a dynamic dimension becomes SplitToSequence with a computed length. The constant folding of onnxscript's
# optimizer, which export runs by default, then reads a missing shape, and the export ends with a PassError.
# Classifier-free guidance usually has this form: cat of two conditions, one call, chunk(2). The same graph is exported
# with a fixed batch, with optimize=False, and with slices instead of chunk.
#
# Our workaround: core/guidance.py uses slices.
# Output seen (2026-11-29, Python 3.11, torch 2.13.0+cpu, onnx 1.23.2):
#   chunk, any batch: PassError, from AttributeError: 'NoneType' object has no attribute 'ndim'
#   chunk, batch of 2: exported
#   chunk, any batch, optimize=False: exported
#   slices, any batch: exported
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2
cd "$work"
cat >halves.py <<'PY'
import torch


class Chunked(torch.nn.Module):
    def forward(self, x):
        given, without = torch.cat([x, -x]).chunk(2)
        return without + 1.5 * (given - without)


class Sliced(torch.nn.Module):
    def forward(self, x):
        both = torch.cat([x, -x])
        half = both.shape[0] // 2
        return both[half:] + 1.5 * (both[:half] - both[half:])


def tried(module, size, **settings):
    program = torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=({0: size},))
    try:
        torch.onnx.export(program, dynamo=True, verbose=False, **settings)
        return "exported"
    except Exception as error:
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        return f"{type(error).__name__}, from {type(first).__name__}: {first}"


any_batch, fixed = torch.export.Dim.DYNAMIC, torch.export.Dim.STATIC
found = {
    "chunk, any batch": tried(Chunked(), any_batch),
    "chunk, batch of 2": tried(Chunked(), fixed),
    "chunk, any batch, optimize=False": tried(Chunked(), any_batch, optimize=False),
    "slices, any batch": tried(Sliced(), any_batch),
}
for name, said in found.items():
    print(f"{name}: {said}")
assert [said == "exported" for said in found.values()] == [False, True, True, True]
PY
"$work/env/bin/python" halves.py 2>/dev/null
