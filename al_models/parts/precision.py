"""Convolutions compute in float32, also on GPUs that would round to TF32 unasked; imported for this effect.

Maps must not depend on the device beyond rounding, and gradient maps (`differnet`, `mkd`) magnify what TF32 rounds off.
A training may ask for bfloat16.
"""

from __future__ import annotations

import torch

torch.backends.cudnn.allow_tf32 = False
