"""What only a GPU can show; where there is none, these tests are skipped, and say so."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from checkpoints import Kept, Killed
from sweep_runs import PADIM, PATCHCORE, run_file, run_flow

from al_models.checks import check_images, quick_detector
from al_models.embedding.stpm import Stpm
from al_models.parts.backbone import cached_backbone
from al_models.parts.sources import MemorySource
from al_models.registry import METHODS, detector_class
from al_models.types import FeatureSpec, Runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

GPU = Runtime(device="cuda")
TOLERANCE = 2e-3
"""Between maps of the two devices, relative to their range: sums are taken in another order."""


@pytest.mark.parametrize("method", METHODS)
def test_what_a_gpu_learned_gives_the_maps_of_the_gpu_on_the_cpu(method: str) -> None:
    detector = quick_detector(detector_class(method))
    images = check_images(detector.image_size)
    detector.fit(MemorySource(images.train, detector, Runtime()), GPU)
    test = MemorySource(images.test, detector, Runtime())
    on_gpu = detector.predict(test, GPU)
    on_cpu = quick_detector(detector_class(method)).load_state(detector.state()).predict(test)
    np.testing.assert_allclose(on_gpu.maps, on_cpu.maps, rtol=0, atol=TOLERANCE * np.ptp(on_cpu.maps))
    np.testing.assert_allclose(on_gpu.scores, on_cpu.scores, rtol=0, atol=TOLERANCE * np.ptp(on_cpu.maps))


@pytest.mark.parametrize("method", [name for name in METHODS if not detector_class(name).traits.trains])
def test_methods_that_do_not_train_learn_the_same_on_both(method: str) -> None:
    found = []
    for runtime in (Runtime(), GPU):
        detector = quick_detector(detector_class(method))
        images = check_images(detector.image_size)
        source = MemorySource(images.train, detector, Runtime())
        found.append(detector.fit(source, runtime).predict(MemorySource(images.test, detector, Runtime())))
    np.testing.assert_allclose(found[1].maps, found[0].maps, rtol=0, atol=1e-2 * np.ptp(found[0].maps))


def test_features_of_both_devices_agree() -> None:
    images = torch.from_numpy(check_images(256).test.copy())
    spec = FeatureSpec()
    cpu, gpu = (cached_backbone(spec, device)(images) for device in ("cpu", "cuda"))
    for layer, values in cpu.items():
        torch.testing.assert_close(gpu[layer].cpu(), values, rtol=0, atol=float(1e-3 * values.abs().max()))


class Often(Stpm):
    training: ClassVar[Mapping[str, Any]] = {**Stpm.training, "checkpoint_every_s": 0.0}


class Killing(Kept):
    def save(self, state):
        super().save(state)
        if self.saves == 4:
            raise Killed


def test_a_training_killed_on_a_gpu_ends_as_one_that_was_not() -> None:
    images = check_images(quick_detector(Stpm).image_size)
    whole, again, kept = quick_detector(Often), quick_detector(Often), Killing()
    whole.fit(MemorySource(images.train, whole, Runtime()), GPU)
    for runs in range(2):
        with pytest.raises(Killed) if runs == 0 else nullcontext():
            again.fit(MemorySource(images.train, again, Runtime()), replace(GPU, checkpoints=kept))
    for name, value in whole.state().items():
        np.testing.assert_allclose(again.state()[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_sweep_on_a_cluster_uses_the_gpu(demo_root: Path, api: str, tmp_path: Path) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE)
    ended = run_flow(run, runner="dask", workers=2)
    assert {record.status for record in ended.outcome.records} == {"done"}
    assert all(torch.cuda.get_device_name() in record.hardware for record in ended.outcome.records)
