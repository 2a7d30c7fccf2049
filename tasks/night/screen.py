"""Screen a night's new good images before anything learns from them: what is rejected is held for a person to decide.

The champion judges the images that it had nothing to do with. Until there is one, all images are compared with each
other, and those that came since the last version are judged by it. A person's word (`storage.held`) ends it: a released
image is learned as good, a refused one never, and neither is asked about again.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.calibration import conformal_threshold
from al_models.drift import FEWEST, Change, changes
from al_models.metrics import resize_map
from al_models.parts.contamination import robust_deviations
from al_models.parts.images import WHOLE
from al_models.registry import create
from al_models.types import FeatureSpec
from storage.errors import StorageError
from storage.held import HeldImage, read_held, write_held
from storage.models import Registry
from storage.models.versions import ModelVersion
from storage.nights import Looks
from storage.samples import Sample, content_hash
from storage.store import Artifact, Draft, Store
from tasks.core.compute import inputs_of, runtime_of
from tasks.core.handles import Cell, Validated
from tasks.core.heat import FLAGGED, Scale, contour, overlay
from tasks.core.limits import in_memory
from tasks.core.policy import Policy
from tasks.core.steps import GPU, code_fingerprint, retry_passing, run_step, step_key
from tasks.core.stored import StoredSource, accepted_samples
from tasks.extract import extract
from tasks.fit import source_for
from tasks.night.decide import Intake, Promise, doubtful
from tasks.night.gate import Gate
from tasks.prepare import prepare, white_of
from tasks.serve.inspect_images import scale_of
from tasks.serve.reference import statistics_of
from tasks.serve.register import LoadedVersion, load_version
from tasks.suspect import compared, shared_spec, without
from tasks.validate import CategoryStopped

logger = logging.getLogger(__name__)

RULE = "held"
"""Rule of the findings about images that are not learned."""
_PICTURES = 500
"""Images of a night that are held with a picture; the others, without."""
_SIDE = 256
_FOLDS = 5
_CHANNELS = 40
"""Channels of the model that judges images out of fold: it has to be fitted five times."""
_OF_LOGARITHMS = 0.64
"""Deviations of logarithms that count as one: they are shorter above the median (of 209 good images of *bottle* 3 %
are beyond 3.2)."""


@task(
    name="screen",
    task_run_name="screen {validated.name}",
    tags=[GPU],
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
def screen(cell: Cell, validated: Validated, features: str | None, policy: Policy, gate: Gate) -> Validated:
    """What may be learned tonight: the images without those that are held or refused.

    `features`: key of the cell's features, which stay good for the images that are left. Of a delivery with too many
    rejected images all are held: a model that lets most defects through no gate lets some through. Raises
    CategoryStopped, after that verdict is kept, when too few are left.
    """
    store = Store(validated.category.store)
    holds = gate.rejected == "hold"
    # Where all is learned, a word that a person has given counts all the same.
    known = {image.id: image for image in read_held(store, validated.name) if holds or image.state != "held"}
    samples = _good(validated)
    _refuse_another_product(store, validated, samples)
    asked = _asked(store, validated.name, samples, known)
    key = None
    if asked.new or asked.compared:
        key = _key(cell, validated, policy, gate, asked)
        found = run_step(store, key, partial(_screen, store, cell, validated, features, policy, gate, asked))
        if holds:
            known |= _hold(store, validated, samples, found, known, doubtful(gate, intake_of(found.meta)))
    reasons = _reasons(samples, known)
    screened = replace(validated, screened=key)
    held = {one.id for one in samples if one.id in known and known[one.id].state == "held"}
    return _without(store, screened, reasons, sorted(held), policy) if reasons else screened


def _refuse_another_product(store: Store, validated: Validated, samples: Sequence[Sample]) -> None:
    """Raises CategoryStopped where the images lie elsewhere than the champion's, and none of them is one of its. A
    folder that was moved has images in common."""
    registry = Registry(store)
    number = registry.aliases(validated.name).points.get("champion")
    if number is None:
        return
    line = registry.get(validated.name, number).lineage
    common = {*line.fitted_on, *line.held_out} & {sample.id for sample in samples}
    if not line.root or line.root == validated.category.root or common:
        return
    raise CategoryStopped(
        f"version {number} of {validated.name} was made of images in {line.root}, and those in "
        f"{validated.category.root} have none in common with it; give another product a name of its own "
        f'(options = {{category = "NAME"}}), or register the cell of this night by hand where the folder has moved'
    )


def intake_of(meta: Mapping[str, Any]) -> Intake:
    """What the gate is told of the new images. `meta`: of the output of this step."""
    return Intake(
        n=meta["new"],
        rejected=len(meta["rejected"]),
        fresh=len(meta["fresh"]),
        fresh_rejected=len(meta["rejected"].keys() & set(meta["fresh"])),
        many=meta["many"],
        promise=meta["promise"] and Promise(**meta["promise"]),
        drift=[Change(**one) for one in meta["drift"]],
        compared=meta["compared"],
        suspected=len(meta["suspected"]),
        rate=meta["rate"],
    )


@dataclass(frozen=True)
class _Asked:
    """What the images are asked about, and who answers."""

    version: ModelVersion | None
    """The champion, or the newest version where there is none."""
    is_champion: bool
    new: list[str]
    """Images that the version judges."""
    fresh: list[str]
    """Images among these that no earlier night has seen."""
    many: int
    """Images that wait for a person since a night on which too many were rejected."""
    compared: list[str]
    """Images that are compared with each other; none where there is a champion."""
    held: list[str]
    """Images among these that were found unlike the others before: more images do not make them good."""


def _good(validated: Validated) -> list[Sample]:
    return [one for one in accepted_samples(validated) if one.split != "test" and one.label == "good"]


def _asked(store: Store, name: str, samples: Sequence[Sample], known: Mapping[str, HeldImage]) -> _Asked:
    """An image that another version holds is judged no more: it waits for a person."""
    registry = Registry(store)
    number = registry.aliases(name).points.get("champion")
    versions = registry.versions(name)
    version = registry.get(name, number) if number is not None else versions[-1] if versions else None
    open_ids = sorted({one.id for one in samples if one.id not in known or known[one.id].state == "held"})
    by = {image: known[image].version for image in open_ids if image in known}
    seen = set() if version is None else {*version.lineage.fitted_on, *version.lineage.held_out}
    judge = version and version.number
    judged = [one for one in open_ids if one not in seen and by.get(one, judge) == judge]
    met = {image for one in versions for image in (*one.lineage.fitted_on, *one.lineage.held_out)} | by.keys()
    fresh, many = [one for one in judged if one not in met], sum(known[image].many for image in by)
    if number is not None:
        return _Asked(version, True, judged, fresh, many, [], [])
    unlike = [one for one in open_ids if one in by and by[one] is None]
    judged, fresh = (judged, fresh) if version else ([], [])
    return _Asked(version, False, judged, fresh, many, open_ids, unlike)


def _key(cell: Cell, validated: Validated, policy: Policy, gate: Gate, asked: _Asked) -> str:
    version = asked.version
    return step_key(
        "screened",
        validated.category.dataset,
        validated.category.category,
        data=validated.fingerprint,
        size=validated.prepared.image_size,
        version=version and [version.number, version.lineage.outputs],
        asked=asdict(replace(asked, version=None)),
        rate=cell.false_reject_rate,
        deviations=policy.suspect_deviations,
        alpha=gate.alpha,
        code=code_fingerprint(__name__),
    )


# what is seen of the images


def _screen(
    store: Store,
    cell: Cell,
    validated: Validated,
    features: str | None,
    policy: Policy,
    gate: Gate,
    asked: _Asked,
    draft: Draft,
) -> dict[str, Any]:
    judged = {"new": 0, "rejected": {}, "scores": {}, "promise": None, "looks": None, "drift": []}
    if asked.version is not None and asked.new:
        judged = _judged(store, cell, validated, features, gate, asked, draft)
    suspected = _suspected(store, cell, validated, features, policy, asked, draft) if asked.compared else {}
    logger.info("%s: %d new images rejected, %d suspected", validated.name, len(judged["rejected"]), len(suspected))
    return {
        **judged,
        "version": asked.version and asked.version.number,
        "fresh": asked.fresh,
        "many": asked.many,
        "compared": len(asked.compared),
        "suspected": suspected,
        "limit": policy.suspect_deviations,
        "rate": cell.false_reject_rate,
    }


def _judged(
    store: Store,
    cell: Cell,
    validated: Validated,
    features: str | None,
    gate: Gate,
    asked: _Asked,
    draft: Draft,
) -> dict[str, Any]:
    """What the version says of the new images, and how they look beside those that were held out for it."""
    assert asked.version is not None
    loaded = load_version(store, asked.version.label)
    promise, ids = _promise(loaded, asked.is_champion), asked.new
    cell, validated, features = seen_by(asked.version, cell, validated, features)
    limit = np.inf if promise.threshold is None else promise.threshold

    def look(batch_size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        source = source_for(loaded.detector, validated, features, ids, batch_size)
        scores: list[float] = []
        maps: dict[str, np.ndarray] = {}
        for part in loaded.detector.predict_batches(source, runtime_of(cell)):
            scores += part.scores.tolist()
            maps |= dict(zip(part.ids[: _PICTURES - len(maps)], part.maps.astype(np.float16), strict=False))
        return np.asarray(scores, np.float64), maps

    scores, maps = in_memory(look, 16)
    _keep_pictures(store, draft, validated, maps, lambda _: scale_of(loaded))
    rejected = {name: float(score) for name, score in zip(ids, scores, strict=True) if score > limit}
    return {
        "new": len(ids),
        "rejected": rejected,
        "scores": dict(zip(ids, scores.tolist(), strict=True)),
        "promise": asdict(promise),
        **_looks(store, loaded, validated, features, gate, asked, scores, len(rejected)),
    }


def _promise(loaded: LoadedVersion, is_champion: bool) -> Promise:
    """The version's threshold. One that has too few held-out images for its own, and is no champion yet, rejects what
    is beyond all of them."""
    set_on, n = loaded.version.calibration, len(loaded.scores)
    if set_on.image is not None or is_champion or n < FEWEST:
        return Promise(set_on.rate, set_on.images, set_on.image, set_on.note)
    return Promise(1 / n, n, conformal_threshold(loaded.scores, 1 / n).value)


def _looks(
    store: Store,
    loaded: LoadedVersion,
    validated: Validated,
    features: str | None,
    gate: Gate,
    asked: _Asked,
    scores: np.ndarray,
    rejected: int,
) -> dict[str, Any]:
    """`looks` and `drift` of the new images beside those held out for the champion; nothing where there is none."""
    if not asked.is_champion:
        return {"looks": None, "drift": []}
    n, set_on, held_out = len(asked.new), loaded.version.calibration, loaded.reference.statistics
    batch = statistics_of(loaded.reference, store, validated.prepared.images, features, asked.new, scores)
    sides = [_quartiles(held_out), _quartiles(batch)]
    looks = Looks(n, rejected, set_on.rate, gate.alpha, set_on.image, *sides)
    counted = None if set_on.image is None else rejected
    found = changes(held_out, batch, rejected=counted, rate=set_on.rate, alpha=gate.alpha) if n >= FEWEST else []
    return {"looks": asdict(looks), "drift": [asdict(one) | {"changed": bool(one.changed)} for one in found]}


def _quartiles(statistics: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: np.quantile(values, [0.25, 0.5, 0.75]).tolist() for name, values in statistics.items()}


def _suspected(
    store: Store,
    cell: Cell,
    validated: Validated,
    features: str | None,
    policy: Policy,
    asked: _Asked,
    draft: Draft,
) -> dict[str, float]:
    """Images too unlike all others, which vouch for none of their own patches: their robust deviations."""
    spec = shared_spec(validated.prepared.image_size)
    if features is None or inputs_of(cell)[1] != spec:
        features = extract.fn(validated, spec, cell.device)
    wanted, samples = set(asked.compared), dict[str, Sample]()
    for sample in _good(validated):
        if sample.id in wanted:
            samples.setdefault(sample.id, sample)
    found = compared(validated, features, spec, list(samples.values()), cell.device)
    fifths = _out_of_fold(validated, features, spec, list(samples.values()), cell)
    deviations = np.maximum(found.deviations, fifths / _OF_LOGARITHMS)
    far = deviations > policy.suspect_deviations
    maps = {name: map for name, map, is_far in zip(samples, found.maps, far, strict=True) if is_far}
    shown = dict(list(maps.items())[:_PICTURES])
    _keep_pictures(store, draft, validated, shown, lambda map: Scale(1.0, max(2.0, float(map.max())), None, ""))
    before = set(asked.held)
    return {
        name: float(value)
        for name, value, is_far in zip(samples, deviations, far, strict=True)
        if is_far or name in before
    }


def _out_of_fold(
    validated: Validated, features: str, spec: FeatureSpec, samples: Sequence[Sample], cell: Cell
) -> np.ndarray:
    """Robust deviations [n] of each image's log score by PaDiM, fitted on the four fifths of the parts that it is not
    among: what several defects have in common is found by it, while they vouch for each other's patches."""
    fold = np.array([int(content_hash((one.part or one.id).encode())[:8], 16) % _FOLDS for one in samples])
    scores = np.ones(len(samples))
    for k in range(_FOLDS):
        seen, unseen = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if len(seen) < 2 or not len(unseen):
            continue
        learn, ask = (
            StoredSource(validated, [samples[i].id for i in rows], spec=spec, features=features, images=False)
            for rows in (seen, unseen)
        )
        detector = create("padim", image_size=spec.image_size, channels=_CHANNELS).fit(learn, runtime_of(cell))
        parts = detector.predict_batches(ask, runtime_of(cell))
        scores[unseen] = np.concatenate([part.scores for part in parts])
    return robust_deviations(np.log(np.maximum(scores, 1e-12)))


def _keep_pictures(
    store: Store, draft: Draft, validated: Validated, maps: Mapping[str, np.ndarray], scale: Any
) -> None:
    """Each image beside its map, as a JPEG in the draft; `scale` gives the ends of a map's colours."""
    if not maps:
        return
    source = StoredSource(validated, list(maps), spec=None, features=None, images=True)
    for batch in source:
        assert batch.images is not None
        for name, pixels in zip(batch.ids, batch.images.numpy(), strict=True):
            picture = _picture(np.ascontiguousarray(pixels), maps[name], scale(maps[name]))
            store.write_bytes(f"{draft.folder}/{name}.jpg", picture)


def _picture(pixels: np.ndarray, map: np.ndarray, scale: Scale) -> bytes:
    side = max(_SIDE, len(pixels))
    image = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
    values = resize_map(map.astype(np.float32), (side, side))
    heat = overlay(image, values, scale)
    if scale.threshold is not None:
        heat[contour(values > scale.threshold, max(1, side // 256))] = FLAGGED
    both = Image.fromarray(np.concatenate([image, heat], axis=1))
    both.thumbnail((2 * _SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    both.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def seen_by(
    version: ModelVersion, cell: Cell, validated: Validated, features: str | None
) -> tuple[Cell, Validated, str | None]:
    """A version's cell on these images, and what it reads of them: images of its size, the key of its features.

    `features`: key of those of the cell, where they are extracted already.
    """
    tonight, cell = inputs_of(cell), cell_of(version, cell)
    size, spec = inputs_of(cell)
    same = version.white == white_of(Store(validated.category.store), validated.prepared.images)
    same = same or validated.category.category != version.category  # synthetic images have 8 bits a channel
    if not same or size != validated.prepared.image_size:  # the verdict is about the files, whatever they become
        white = None if same else version.white or WHOLE
        validated = replace(validated, prepared=prepare.fn(validated.category, size, white))
    if spec is None:
        return cell, validated, None
    if features is None or not same or (size, spec) != tonight:
        features = extract.fn(validated, spec, cell.device)
    return cell, validated, features


def cell_of(version: ModelVersion, cell: Cell) -> Cell:
    """The cell with the version's method, parameters and seed."""
    return replace(cell, method=version.method, params=version.params, seed=version.seed)


# what follows


def _hold(
    store: Store,
    validated: Validated,
    samples: Sequence[Sample],
    seen: Artifact,
    known: Mapping[str, HeldImage],
    many: bool,
) -> dict[str, HeldImage]:
    """Ask a person about each image that was rejected or suspected and that nobody was asked about: those images.

    `many`: more were rejected than chance lets through; then about all that were judged.
    """
    meta = seen.meta
    by_id = {sample.id: sample for sample in reversed(samples)}
    threshold = (meta["promise"] or {}).get("threshold")
    asked = meta["scores"] if many else meta["rejected"]
    found = {name: (score, threshold, meta["version"]) for name, score in asked.items()}
    # An image that is both goes by its score, which the version can be asked for again.
    found = {name: (value, meta["limit"], None) for name, value in meta["suspected"].items()} | found
    now, held = datetime.now(UTC).isoformat(timespec="seconds"), dict[str, HeldImage]()
    for name, (score, limit, version) in found.items():
        if name not in known:
            at = by_id[name]
            image = HeldImage(validated.name, name, at.key, validated.category.root, now, score, limit, version, many)
            write_held(store, image, _kept_picture(store, f"{seen.folder}/{name}.jpg"))
            held[name] = image
    return held


def _kept_picture(store: Store, key: str) -> bytes | None:
    try:
        return store.read_bytes(key)
    except (StorageError, OSError):  # of the first images only
        return None


def _reasons(samples: Iterable[Sample], known: Mapping[str, HeldImage]) -> dict[str, str]:
    """Why images are not learned tonight, by their keys."""
    reasons: dict[str, str] = {}
    for sample in samples:
        image = known.get(sample.id)
        if image is not None and image.state == "refused":
            reasons[sample.key] = f"refused by {image.said[-1].who}; `al nights release` takes that back"
        elif image is not None and image.state == "held":
            reasons[sample.key] = f"held: {image.why}; `al nights release` or `al nights refuse` says what it is"
    return reasons


def _without(
    store: Store, validated: Validated, reasons: Mapping[str, str], held: Sequence[str], policy: Policy
) -> Validated:
    key = step_key(
        "verdicts",
        validated.category.dataset,
        validated.category.category,
        verdict=validated.verdict,
        reasons=dict(sorted(reasons.items())),
        policy=policy.model_dump(),
        code=code_fingerprint(__name__),
    )

    def work(draft: Draft) -> dict[str, Any]:
        return without(store, validated, RULE, reasons, policy, draft) | {"held": list(held)}

    verdict = run_step(store, key, work).meta
    if verdict["stop"] is not None:
        raise CategoryStopped(f"{validated.name}: {verdict['stop']}")
    return replace(validated, verdict=key, fingerprint=verdict["fingerprint"])
