"""Catalogue and verdict of 100,000 images: seconds and peak memory, without image files, hashing and decoding.

    python tests/benchmarks/validate_100k.py [--images N]

The samples and what `prepare` would have seen of them are drawn: several sizes, four images a physical part, a few of
every fault, 500 pairs of near-duplicates. Twice: with perceptual hashes as different as those of textures, and with
those of an aligned product, where most bits agree. Each is judged in a process of its own, whose peak resident memory
(imports included) is printed; the 500 pairs must all be found and no others.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import pandas as pd

from storage.samples import Sample, fingerprint, from_parquet, to_parquet
from storage.store import Store
from tasks.core.handles import Category, Prepared
from tasks.prepare import COLUMNS

DATASET, CATEGORY, IMAGES = "mvtec_ad", "grid", "images/mvtec_ad/grid/drawn"
PAIRS = 500
FAULTS = 20
VARIABLE_BITS = {"textures": 256, "aligned": 80}


def main() -> None:
    """Draw and judge each variant in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--step", choices=["draw", "judge"], help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=list(VARIABLE_BITS), help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step == "draw":
        draw(given.store, given.images, VARIABLE_BITS[given.variant])
        return
    if given.step == "judge":
        print(json.dumps(judge(given.store)))
        return
    print(f"{'':10}{'catalogue s':>13}{'verdict s':>11}{'together s':>12}{'peak MiB':>10}  findings")
    for variant in VARIABLE_BITS:
        with tempfile.TemporaryDirectory() as store:
            own = [sys.executable, __file__, "--images", str(given.images), "--variant", variant, "--store", store]
            subprocess.run([*own, "--step", "draw"], check=True)
            said = subprocess.run([*own, "--step", "judge"], check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(said.splitlines()[-1])
        print(
            f"{variant:10}{row['catalogue_s']:13.1f}{row['verdict_s']:11.1f}"
            f"{row['catalogue_s'] + row['verdict_s']:12.1f}{row['peak_mib']:10.0f}  {row['findings']}"
        )


def judge(url: str) -> dict[str, object]:
    """What `ingest` does after hashing, then the verdict as the pipeline makes it."""
    from tasks.validate import findings, validate

    store = Store(url)
    samples = from_parquet(store.read_bytes("drawn/samples.parquet"))
    started = time.perf_counter()
    content = fingerprint(samples)
    with store.draft("catalogues/drawn") as draft:
        store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet(samples))
        draft.commit({"set_aside": [], "folders": ["."]})
    del samples
    assert len(from_parquet(store.read_bytes(f"{store.get('catalogues/drawn').folder}/samples.parquet")))
    catalogue_s = time.perf_counter() - started

    started = time.perf_counter()
    prepared = Prepared(Category(url, DATASET, CATEGORY, url, "catalogues/drawn", content), 256, IMAGES)
    verdict = validate.fn(prepared).verdict
    verdict_s = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    found = findings(store, verdict)["rule"].value_counts().to_dict()
    near = found.get("near_unique_in_split", 0) + found.get("near_unique_across_splits", 0)
    assert near == PAIRS, f"{near} near-duplicates found, {PAIRS} drawn"
    return {"catalogue_s": catalogue_s, "verdict_s": verdict_s, "peak_mib": peak, "findings": found}


def draw(url: str, n: int, variable_bits: int) -> None:
    """Write the samples, and the facts where `prepare` would have put them."""
    rng = np.random.default_rng(0)
    facts = draw_facts(n, variable_bits, rng)
    store = Store(url)
    wanted = ["id", "path", "split", "label", "defect_type", "part"]
    rows = facts[wanted].astype(object).itertuples(index=False)
    samples = [
        Sample(
            row.id,
            row.path,
            DATASET,
            CATEGORY,
            row.split,
            row.label,
            row.defect_type,
            mask=f"mask/{row.path}" if row.label == "anomalous" else None,
            mask_id=row.id if row.label == "anomalous" else None,
            part=row.part,
        )
        for row in rows
    ]
    store.write_bytes("drawn/samples.parquet", to_parquet(samples))
    buffer = io.BytesIO()
    facts.to_parquet(buffer, index=False)
    with store.draft(IMAGES) as draft:
        store.write_bytes(f"{draft.folder}/facts.parquet", buffer.getvalue())
        draft.commit({})


def draw_facts(n: int, variable_bits: int, rng: np.random.Generator) -> pd.DataFrame:
    """The columns of `facts.parquet`: 80 % training, 5 % validation, 5 % good and 10 % anomalous test images."""
    row = np.arange(n)
    split = np.select([row < 0.8 * n, row < 0.85 * n], ["train", "validation"], "test")
    anomalous = row >= 0.9 * n
    kind = np.where(anomalous, np.array(["bent", "broken", "glue"])[row % 3], "good")
    side = np.where(rng.random(n) < 0.9, 512, rng.choice([480, 640], n))
    facts = pd.DataFrame(
        {
            "id": [f"{i:032x}" for i in row],
            "path": [f"{s}/{k}/{i:06}.png" for s, k, i in zip(split, kind, row, strict=True)],
            "part": [f"part {i // 4}" for i in row],
            "split": split,
            "label": np.where(anomalous, "anomalous", "good"),
            "defect_type": kind,
            "readable": True,
            "width": side,
            "height": side,
            "format": "PNG",
            "mode": "L",
            "bit_depth": 8,
            "n_channels": 1,
            "brightness": rng.normal(115, 10, n),
            "contrast": rng.normal(40, 5, n),
            "sharpness": np.exp(rng.normal(6, 0.3, n)),
            "perceptual_hash": draw_hashes(n, variable_bits, row < 0.8 * n, rng),
            "constant": False,
            "mask_state": np.where(anomalous, "file", "no defect"),
            "mask_width": np.where(anomalous, side, np.nan),
            "mask_height": np.where(anomalous, side, np.nan),
            "mask_fraction": np.where(anomalous, rng.uniform(0.001, 0.2, n), np.nan),
        }
    )
    facts["key"] = facts["path"]
    facts = facts.reindex(columns=list(COLUMNS)).astype(COLUMNS)
    break_some(facts, rng)
    return facts


def draw_hashes(n: int, variable_bits: int, training: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Hexadecimal digits. The last 500 training images are nearly one of the first or last ones, 3 bits apart."""
    bits = np.broadcast_to(rng.random(256) < 0.5, (n, 256)).copy()
    chosen = rng.permutation(256)[:variable_bits]
    bits[:, chosen] = rng.random((n, variable_bits)) < 0.5
    last = np.flatnonzero(training)[-PAIRS:]
    bits[last] = bits[np.where(np.arange(PAIRS) % 2, np.arange(PAIRS), n - PAIRS + np.arange(PAIRS))]
    bits[last[:, None], chosen[:3]] ^= True
    return [digits.tobytes().hex() for digits in np.packbits(bits, axis=1)]


def break_some(facts: pd.DataFrame, rng: np.random.Generator) -> None:
    """A few of every fault, in images that are in no pair of near-duplicates."""
    n = len(facts)
    spare = iter(rng.permutation(np.arange(2 * PAIRS, int(0.75 * n))).reshape(-1)[: 20 * FAULTS].reshape(20, FAULTS))
    test = iter(rng.permutation(np.arange(int(0.9 * n), n - PAIRS))[: 6 * FAULTS].reshape(6, FAULTS))
    unreadable = next(spare)
    facts.loc[unreadable, "readable"] = False
    facts.loc[unreadable, "problem"] = "damaged or cut short; copy or export the file again"
    seen = ["width", "height", "format", "mode", "bit_depth", "n_channels", "brightness", "contrast", "sharpness"]
    facts.loc[unreadable, [*seen, "perceptual_hash", "constant"]] = pd.NA
    facts.loc[next(spare), "constant"] = True
    facts.loc[next(spare), "height"] = 8
    facts.loc[next(spare), ["bit_depth", "note"]] = [16, "16-bit gray values were scaled by 1/257 to 8 bits"]
    facts.loc[next(spare), "format"] = "JPEG"
    facts.loc[next(spare), "n_channels"] = 3
    facts.loc[next(spare), "brightness"] = 250.0
    facts.loc[next(spare), "contrast"] = 2.0
    facts.loc[next(spare), "sharpness"] = 5.0
    same = ["id", "perceptual_hash"]
    facts.loc[next(spare), same] = facts.loc[next(spare), same].to_numpy()  # copies in a split
    facts.loc[next(spare), same] = facts.loc[next(test), same].to_numpy()  # copies in two splits
    facts.loc[next(spare), "part"] = facts.loc[next(test), "part"].to_numpy()
    facts.loc[next(test), "mask_fraction"] = 0.0
    facts.loc[next(test), "mask_fraction"] = 1.0
    facts.loc[next(test), "mask_width"] = 100
    unknown = next(test)
    facts.loc[unknown, "mask_state"] = "unknown"
    facts.loc[unknown, ["mask_width", "mask_height", "mask_fraction"]] = pd.NA


if __name__ == "__main__":
    main()
