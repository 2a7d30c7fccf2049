"""Convolutions compute in float32, also on GPUs that would round to TF32 unasked; imported for this effect.

Maps must not depend on the device beyond rounding, and gradient maps (`differnet`, `mkd`) multiply what TF32 leaves
out: on an H100 they differed from the CPU's by up to a sixth of their range. A training may ask for bfloat16.
"""

from __future__ import annotations

import torch

torch.backends.cudnn.allow_tf32 = False
