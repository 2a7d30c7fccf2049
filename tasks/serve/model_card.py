"""The model card: what a version is, what it promises, and what not, for those who did not make it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from al_models.registry import METHODS, detector_class
from storage.models.versions import ModelVersion
from tasks.compare.tables import ABSENT, METRICS, known_first, percent
from tasks.core.markdown import escaped, markdown_table


def model_card(version: ModelVersion) -> str:
    """The card as Markdown."""
    sections = {
        "What it is": _what(version),
        "Data": _data(version),
        "Thresholds": _thresholds(version),
        "Metrics": _metrics(version),
        "Use and limits": _limits(version),
        "Lineage": _lineage(version),
        "Made with": _table(version.versions | {"hardware": version.hardware}),
        "To load it": _loading(version),
    }
    parts = [f"# {escaped(version.name)}, version {version.number}: {version.method}"]
    return "\n\n".join([*parts, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _what(version: ModelVersion) -> str:
    method = METHODS[version.method]
    traits = detector_class(version.method).traits
    learned = "It was trained by gradient descent" if traits.trains else "It was fitted without training a network"
    sees = ", on the frozen features named below." if version.features else "."
    text = (
        f"A detector that has learned from good images of {escaped(version.name)} what good looks like. It gives each "
        "new image a map of what is not, a value a pixel, and a score; higher is more anomalous. "
        f"Method: {version.method} ({method.paper}), family {method.family.replace('_', ' ')}. {learned}{sees}"
    )
    params = {name: json.dumps(value) for name, value in sorted(version.params.items())} | {"seed": str(version.seed)}
    return f"{text}\n\n{_table(params)}"


def _data(version: ModelVersion) -> str:
    line = version.lineage
    text = (
        f"Learned from {_images(len(line.fitted_on))}; thresholds set on {_images(len(line.held_out))} that it did not "
        f"learn from. Content name of the data: `{version.fingerprints.get('data', ABSENT)}`. The names of all images "
        "are in `version.json`."
    )
    uses = {name.replace("_", " "): str(count) for name, count in version.counts.items()}
    return f"{text}\n\n{_table(uses)}" if uses else text


def _images(count: int) -> str:
    return "1 good image" if count == 1 else f"{count} good images"


def _thresholds(version: ModelVersion) -> str:
    asked = version.calibration
    if asked.image is None:
        return f"None: {escaped(asked.note or 'there were too few held-out images')}."
    text = (
        f"Asked for: at most {percent(asked.rate)} % of good parts rejected. Set on {_images(asked.images)} held out, "
        "by conformal order statistics: a new good image drawn like these is rejected with at most this probability, "
        "and with at most this probability shows any pixel above the threshold of the map; both on average over "
        "held-out sets. No such promise is made about defects."
    )
    pixel = ABSENT if asked.pixel is None else f"{asked.pixel:.6g}"
    values = {
        "score above which an image is rejected": f"{asked.image:.6g}",
        "map value above which a pixel is marked": pixel,
    }
    return f"{text}\n\n{_table(values)}{_realised(asked.realised)}"


def _realised(realised: Mapping[str, Any]) -> str:
    did = []
    for rate, what in (("false_reject", "of the good were rejected"), ("miss", "of the defective were missed")):
        if f"{rate}_rate" in realised:
            low, high = realised[f"{rate}_interval"]
            share = percent(realised[f"{rate}_rate"])
            did.append(f"{share} % {what} (95 % interval {percent(low)} to {percent(high)})")
    return f"\n\nOn the labelled test images: {', '.join(did)}." if did else ""


def _metrics(version: ModelVersion) -> str:
    names = known_first(set(version.metrics))
    if not names:
        return "None: the run had no labelled test images."
    rows = [[METRICS.get(name, name), percent(version.metrics[name]), _interval(version, name)] for name in names]
    return "On test images that set nothing, in %.\n\n" + markdown_table(["metric", "value", "95 % interval"], rows)


def _interval(version: ModelVersion, metric: str) -> str:
    ends = version.intervals.get(metric) or {}
    if ends.get("low") is None:
        return str(ends.get("note") or ABSENT)
    return f"{percent(ends['low'])} to {percent(ends['high'])}"


def _limits(version: ModelVersion) -> str:
    lines = [
        f"For images of {escaped(version.name)} taken as those it learned from: the same camera, light and product. "
        "After a change of any of them, fit and calibrate again. `al predict` says when a batch has changed, and does "
        "not judge images that look like something else.",
        "A score says how unlike the good images an image is, not how bad a defect is. Defects that look like good "
        "parts, or that the image does not show, are missed.",
        "Metrics are of one test set; defects of other kinds may be found better or worse.",
    ]
    if detector_class(version.method).traits.aligned_images_only:
        lines.append("It compares positions: the part must lie in the same place in every image.")
    if version.white is not None:
        lines.append(
            f"Its images have more than 8 bits a channel: values of 0 to {version.white:g}, the range of its good "
            "images, become 0 to 255, and larger ones count as white. `al predict` does so, and tells of these; the "
            "ONNX file takes values that were scaled so."
        )
    if version.features:
        lines.append(
            f"It reads features of {version.features.spec['backbone']} with the weights `{version.features.weights}`; "
            "with other weights its maps mean nothing."
        )
    return "\n".join(f"- {line}" for line in [*lines, *map(escaped, version.warnings)])


def _lineage(version: ModelVersion) -> str:
    line = version.lineage
    parent = f"version {line.parent}" if line.parent else "none"
    rows = {"champion when it was added": parent, "added": version.created, "run record": line.record}
    rows |= {"learned on top of": line.updated_from} if line.updated_from else {}
    rows |= {f"copied from {step}": key for step, key in line.outputs.items()}
    rows |= {f"fingerprint of {what}": name for what, name in version.fingerprints.items() if what in ("data", "code")}
    return _table(rows | {f"SHA-256 of {file}": digest for file, digest in version.files.items()})


def _loading(version: ModelVersion) -> str:
    return f"""From the store, checked and with the values that give p-values:

```python
from storage.store import Store
from tasks.serve.register import load_version

loaded = load_version(Store("STORE"), "{version.label}")
```

From this folder, as `al models export {version.label} --to FOLDER` writes it:

```python
import json
from pathlib import Path

import safetensors.numpy

from al_models import create

version = json.loads(Path("version.json").read_text(encoding="utf-8"))
detector = create(version["method"], **version["params"])
detector.load_state(safetensors.numpy.load_file("state.safetensors"))
prediction = detector.predict(images)  # uint8 arrays [n, h, w, 3], or paths
```{_onnx(version)}"""


def _onnx(version: ModelVersion) -> str:
    if not detector_class(version.method).traits.graph:
        return ""
    return f"""

Without this program, from the file that `al models export {version.label} --format onnx --to FOLDER` writes:

```python
import onnxruntime

model = onnxruntime.InferenceSession("model.onnx")
maps, scores, p_values = model.run(None, {{"images": images}})  # uint8 [n, h, w, 3], RGB
```"""


def _table(rows: Mapping[str, str]) -> str:
    return markdown_table(["", ""], _pairs(rows))


def _pairs(rows: Mapping[str, str]) -> Iterable[list[str]]:
    return ([name, value or ABSENT] for name, value in rows.items())
