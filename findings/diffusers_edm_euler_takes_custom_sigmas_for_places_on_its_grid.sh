#!/usr/bin/env bash
# diffusers 0.42.1: EDMEulerScheduler.set_timesteps(sigmas=...) does not sample at these noise levels. It treats them
# as positions between 0 and 1 on its own grid, where 0 is sigma_max and 1 is sigma_min.
#
# The docstring reads "Custom sigmas to use for the denoising process". The levels 80, 2, 0.5 become -2.6e14, -1.4 and
# 2.5, and two of the network's three times are nan, without an error. A list, which the docstring also allows, raises
# AttributeError. The working argument for three levels would be the tensor [0, 0.5, 1].
#
# Our workaround: DenoisingPipeline (pipelines/denoising.py) sets the scheduler's levels itself.
# Output seen (2026-11-29, Python 3.11, torch 2.13.0+cpu):
#   sigmas for tensor([80, 2, 0.5]): [-263019082809344.0, -1.379, 2.515, 0.0]
#   times: [nan, nan, 0.231]
#   sigmas for tensor([0, 0.5, 1]): [80.0, 2.515, 0.002, 0.0]
#   a list: AttributeError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$work"
cat >levels.py <<'PY'
import math

import torch
from diffusers import EDMEulerScheduler


def rounded(values):
    return [round(value, 3) for value in values.tolist()]


scheduler = EDMEulerScheduler()
scheduler.set_timesteps(sigmas=torch.tensor([80.0, 2.0, 0.5]))
print("sigmas for tensor([80, 2, 0.5]):", rounded(scheduler.sigmas))
print("times:", rounded(scheduler.timesteps))
assert scheduler.sigmas[0] < -1e14 and scheduler.sigmas[1] < 0 and abs(scheduler.sigmas[2] - 2.515) < 1e-3
assert [math.isnan(time) for time in scheduler.timesteps.tolist()] == [True, True, False]
scheduler.set_timesteps(sigmas=torch.tensor([0.0, 0.5, 1.0]))
print("sigmas for tensor([0, 0.5, 1]):", rounded(scheduler.sigmas))
assert rounded(scheduler.sigmas) == [80.0, 2.515, 0.002, 0.0]
try:
    scheduler.set_timesteps(sigmas=[80.0, 2.0, 0.5])
    raise SystemExit("a list was taken")
except AttributeError as error:
    print("a list:", type(error).__name__)
PY
"$work/env/bin/python" levels.py 2>/dev/null
