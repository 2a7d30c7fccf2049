"""Where a step computes: the device, its precision, and who hears of its progress."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

from al_models.detector import Detector
from al_models.errors import InvalidInput
from al_models.registry import create
from al_models.types import Checkpoints, FeatureSpec, Runtime
from tasks.core.handles import Cell
from tasks.core.progress import Progress

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def detector_of(cell: Cell) -> Detector:
    """The cell's detector, not fitted. Raises UnknownName."""
    return create(cell.method, **cell.params)


def inputs_of(cell: Cell) -> tuple[int, FeatureSpec | None]:
    """The image size and the features that the cell's method asks for. Raises UnknownName."""
    detector = detector_of(cell)
    spec = detector.feature_spec()
    return spec.image_size if spec else detector.image_size, spec


def device_of(asked: str) -> str:
    """`auto` is a GPU where there is one. Raises InvalidInput for a device this process does not have."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", asked) is None:
        raise InvalidInput(f"device {asked!r} was asked for; expected is auto, cpu, cuda or cuda:N, such as cuda:1")
    kind, _, number = asked.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device {asked!r} was asked for, but no GPU is visible here; use 'cpu' or 'auto'")
    if number and int(number) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise InvalidInput(f"device {asked!r} was asked for, but the last GPU visible here is 'cuda:{last}'")
    return asked


def runtime_of(cell: Cell, checkpoints: Checkpoints | None = None) -> Runtime:
    """How this process computes the cell."""
    device = device_of(cell.device)
    return Runtime(
        device=device,
        seed=cell.seed,
        mixed_precision=_bfloat16_pays(device),
        progress=Progress(cell.name),
        checkpoints=checkpoints,
    )


@cache
def hardware_of(asked: str) -> str:
    """Processor, instruction set and cores of this machine, and the GPU where the device asked for is one.

    Results are equal to the bit on one instruction set, and equal up to rounding on others.
    """
    names = {line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")}
    kind = torch.backends.cpu.get_cpu_capability()
    text = f"{min(names, default=platform.machine())} ({kind}), {os.cpu_count()} cores"
    device = device_of(asked)
    return f"{text}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else text


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []


def _reuse_freed_memory() -> None:
    """Have glibc keep freed memory (up to 512 MB) instead of returning each large tensor to the system.

    By default every activation is mapped, faulted in page by page and unmapped again: half of the time of a
    bare extraction loop on a CPU, less within a flow. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_ARENA_MAX, 1)  # a thread's own arena is too small for a tensor
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**29)


_reuse_freed_memory()  # at import: a thread keeps the arena it was dealt when it started


def _bfloat16_pays(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; where it does not, it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
