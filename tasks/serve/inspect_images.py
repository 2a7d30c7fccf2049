"""Judge image files into a folder, each exactly once, however often the work is cut and begun again.

    judged.jsonl                 the journal: a line an image
    maps/*.tiff                  float16, at the size that the detector works at
    masks/*.png, overlays/*.png  the pixels above the threshold, at the image's own size; the heat-map over the image

The files of an image are on disk before its line is, and are named by path, content and version. So an image with a
line has all its files, and one without is judged again into the same names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import tifffile
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.metrics import resize_map
from al_models.metrics.keys import just_below
from al_models.outlines import Region, regions_above
from storage.errors import Damaged
from storage.journal import Journal
from storage.models.versions import STATE
from storage.store import Store
from tasks.core.heat import FLAGGED, Scale, contour, overlay, png
from tasks.core.progress import Progress
from tasks.core.steps import GPU
from tasks.serve.judge import Judge, JudgedImage, Opened, open_image
from tasks.serve.register import LoadedVersion

JOURNAL = "judged.jsonl"
_AT_ONCE = min(4, os.cpu_count() or 1)
"""Images that are decoded, or written, at the same time: each may take a GB."""


@task(name="judge", task_run_name="judge {title}", tags=[GPU], cache_policy=NO_CACHE)
def judge_images(inspection: Inspection, title: str, paths: Sequence[str]) -> dict[str, int]:
    """Judge these files; how many there are of each decision, those that were judged before left out."""
    return dict(inspection.take(paths, Progress(f"judge {title}")))


class Inspection:
    """The work of one version in one folder; to be entered by the only process that writes there."""

    def __init__(self, loaded: LoadedVersion, out: str | Path, device: str = "auto", batch_size: int = 16) -> None:
        """Nothing is written yet. Raises InvalidInput for a device that is not there."""
        self.loaded, self.out = loaded, Path(out).absolute()
        self.judge, self.journal = Judge(loaded, device, batch_size), Journal(self.out / JOURNAL)
        self.asked: set[bytes] = set()
        """The images of this run, judged now or before."""
        self._store, self._known, self._scale = Store(str(self.out)), set[bytes](), scale_of(loaded)

    def __enter__(self) -> Self:
        """Raises InUse when another process works in the folder, Damaged for a journal that is not one of ours."""
        with ExitStack() as stack:
            stack.enter_context(self.journal)
            try:
                self._known = {key_of(line) for line in self.journal if line["id"]}
            except KeyError as error:
                raise Damaged(f"{self.journal.path} has a line without {error}; give another folder") from error
            self._entered = stack.pop_all()  # an error lets go of the folder at once
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def take(self, paths: Sequence[str], progress: Progress | None = None) -> Counter[str]:
        """Judge these files but for those that were judged before; how many there are of each decision."""
        decisions: Counter[str] = Counter()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            done = 0
            for size, opened in self._batches(pool, paths):
                decisions.update(self._settle(pool, opened))
                done += size
                if progress is not None:
                    progress("", done, len(paths))
        return decisions

    def _batches(self, pool: ThreadPoolExecutor, paths: Sequence[str]) -> Iterator[tuple[int, list[Opened]]]:
        """(files looked at, those to be judged), a batch at a time; the next is decoded while this one is worked on."""
        pending: list[Future[Opened | None]] = []
        step = self.judge.batch_size
        for start in range(0, len(paths) + step, step):
            following = [pool.submit(self._open, path) for path in paths[start : start + step]]
            if pending:
                yield len(pending), [one for future in pending if (one := future.result()) is not None]
            pending = following

    def _open(self, path: str) -> Opened | None:
        return open_image(path, self.judge.size, lambda name: self._is_known(path, name), self.loaded.version.white)

    def _is_known(self, path: str, name: str) -> bool:
        key = key_of(self._identity(path, name))
        self.asked.add(key)
        return key in self._known

    def _settle(self, pool: ThreadPoolExecutor, opened: Sequence[Opened]) -> list[str]:
        """Judge, write the files, then the lines."""
        if not opened:
            return []
        began = time.perf_counter()
        judged = self.judge(opened)
        lines = list(pool.map(self._written, judged))
        seconds, now = (time.perf_counter() - began) / len(opened), datetime.now(UTC).isoformat(timespec="seconds")
        self.journal.append([line | {"seconds": round(seconds, 4), "judged": now} for line in lines])
        keys = {key_of(line) for line in lines}
        self.asked |= keys
        self._known |= keys
        return [line["decision"] for line in lines]

    def _identity(self, path: str, name: str) -> dict[str, Any]:
        """What names a line."""
        version = self.loaded.version
        # The bytes of a name need not be text, and those who read the line want text.
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
        return {"path": text, "id": name, "model": version.label, "state": version.files[STATE]}

    def _written(self, judged: JudgedImage) -> dict[str, Any]:
        """The line of an image whose files have been written."""
        opened = judged.opened
        line = self._identity(opened.path, opened.id)
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(line['path']).stem)[:60]}-{key_of(line).hex()}"
        regions: list[Region] = []
        files: dict[str, bytes] = {}
        if judged.map is not None:
            files["maps"] = _tiff(judged.map)
        threshold = self.loaded.version.calibration.pixel
        if judged.map is not None and judged.decision != "out_of_scope":
            files["overlays"] = self._overlay(opened.picture, judged.map)
            if threshold is not None:
                values = resize_map(judged.map, (opened.height, opened.width))
                regions = regions_above(values, threshold)
                files["masks"] = png(Image.fromarray(255 * (values > threshold).astype(np.uint8)))
        places = {what: f"{what}/{name}.{'tiff' if what == 'maps' else 'png'}" for what in files}
        for what, place in places.items():
            self._store.write_bytes(place, files[what])
        return line | _line(judged) | {"regions": [asdict(region) for region in regions], "files": places}

    def _overlay(self, picture: np.ndarray, map: np.ndarray) -> bytes:
        height, width = picture.shape[:2]
        values = resize_map(map, (height, width))
        heat = overlay(picture, values, self._scale)
        if self._scale.threshold is not None:
            heat[contour(values > self._scale.threshold, max(1, max(height, width) // 256))] = FLAGGED
        return png(Image.fromarray(heat), optimize=False)


def key_of(line: Mapping[str, Any]) -> bytes:
    """The identity of a line: this content, under this path, judged by this version."""
    named = [line["path"], line["id"], line["model"], line["state"]]
    return hashlib.sha256(json.dumps(named).encode()).digest()[:12]


def _line(judged: JudgedImage) -> dict[str, Any]:
    """All figures about an image, for its line."""
    opened = judged.opened
    return {
        "decision": judged.decision,
        "reason": judged.reason,
        "note": opened.note,
        "beyond": opened.beyond,
        "score": judged.score,
        "p_value": judged.p_value,
        "deviations": judged.deviations,
        "features": judged.features,
        **opened.light,
        "width": opened.width or None,
        "height": opened.height or None,
    }


def _tiff(map: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, map)
    return buffer.getvalue()


def scale_of(loaded: LoadedVersion) -> Scale:
    """The scale from the median of the held-out images' map values to as far beyond the threshold as that is beyond
    it."""
    shares = np.cumsum(loaded.pixels.shares)
    low, most = (float(just_below(np.searchsorted(shares, share * shares[-1]))) for share in (0.5, 1))
    threshold = loaded.version.calibration.pixel
    high = most if threshold is None or threshold <= low else 2 * threshold - low
    return Scale(low, high if high > low else low + 1.0, threshold, "")
