"""The rules of validation, asked of drawn facts: what is found, what is told, what follows, and what it costs."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from storage.errors import NotInStore
from storage.samples import Sample, from_parquet, to_parquet
from storage.store import Store
from tasks.core.handles import Category, Prepared
from tasks.core.policy import DEFAULTS, Policy
from tasks.ingest import ingest
from tasks.prepare import COLUMNS, prepare
from tasks.validate import FINDINGS, CategoryStopped, build_data_docs, copies, findings, validate, verdict_key
from tasks.validate.copies import distance_limit, nearly_same, unpack
from tasks.validate.expectations import ask
from tasks.validate.rules import Rule, counts_table, rules_for, with_comparisons

NUMBER = itertools.count()


def hashes(n: int, seed: int = 0, variable: int = 256) -> list[str]:
    """Perceptual hashes of which only some bits vary."""
    rng = np.random.default_rng(seed)
    bits = np.zeros((n, 256), bool)
    bits[:, :variable] = rng.random((n, variable)) < 0.5
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


def differing(digits: str, bits: int) -> str:
    """The same hash but for the first bits."""
    return f"{int(digits, 16) ^ (((1 << bits) - 1) << (256 - bits)):064x}"


def facts(train: int = 30, good: int = 4, bent: int = 4) -> pd.DataFrame:
    """What is seen of sound images of 64 px with masks, in the order of a catalogue (test before train)."""
    kinds = ["test/bent"] * bent + ["test/good"] * good + ["train/good"] * train
    n, rng = len(kinds), np.random.default_rng(1)
    anomalous = np.array([kind == "test/bent" for kind in kinds])
    table = pd.DataFrame(
        {
            "id": [f"{i:032x}" for i in range(n)],
            "path": [f"{kind}/{i:03}.png" for i, kind in enumerate(kinds)],
            "split": [kind.split("/")[0] for kind in kinds],
            "label": np.where(anomalous, "anomalous", "good"),
            "defect_type": [kind.split("/")[1] for kind in kinds],
            "readable": True,
            "width": 64,
            "height": 64,
            "format": "PNG",
            "mode": "L",
            "bit_depth": 8,
            "n_channels": 1,
            "brightness": rng.normal(115, 8, n),
            "contrast": rng.normal(40, 4, n),
            "sharpness": np.exp(rng.normal(6, 0.3, n)),
            "perceptual_hash": hashes(n),
            "constant": False,
            "mask_state": np.where(anomalous, "file", "no defect"),
            "mask_width": np.where(anomalous, 64.0, np.nan),
            "mask_height": np.where(anomalous, 64.0, np.nan),
            "mask_fraction": np.where(anomalous, 0.1, np.nan),
        }
    )
    table["key"] = table["path"]
    return table.reindex(columns=list(COLUMNS)).astype(COLUMNS)


@dataclass(frozen=True)
class Verdict:
    prepared: Prepared
    meta: dict[str, Any]
    found: pd.DataFrame
    kept: dict[str, Sample]

    @property
    def rules(self) -> dict[str, list[str]]:
        """Rule -> keys."""
        return self.found.groupby("rule")["key"].agg(list).to_dict()

    def reason(self, key: str) -> str:
        (reason,) = self.found.loc[self.found["key"] == key, "reason"]
        return str(reason)


def kept_facts(table: pd.DataFrame, dataset: str = "drawn", category: str = "part") -> Prepared:
    """The facts, and the catalogue that belongs to them, in a store of their own."""
    store = Store(f"memory://validate-{next(NUMBER)}")
    samples = [
        Sample(
            row.id,
            row.path,
            dataset,
            category,
            row.split,
            row.label,
            row.defect_type,
            mask=f"masks/{row.key}" if row.mask_state in ("file", "unreadable") else None,
            mask_id=row.id if row.mask_state in ("file", "unreadable") else None,
            part=None if pd.isna(row.part) else row.part,
            box=row.key[len(row.path) + 1 : -1] or None,
        )
        for row in table.itertuples()
    ]
    with store.draft("catalogues/0") as draft:
        store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet(samples))
        draft.commit({"set_aside": [], "folders": ["."]})
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    with store.draft("images/0") as draft:
        store.write_bytes(f"{draft.folder}/facts.parquet", buffer.getvalue())
        draft.commit({})
    return Prepared(Category(store.url, dataset, category, "/nowhere", "catalogues/0", "0"), 64, "images/0")


def judge(table: pd.DataFrame, *, dataset: str = "drawn", category: str = "part", **policy: Any) -> Verdict:
    prepared = kept_facts(table, dataset, category)
    store, key = Store(prepared.category.store), verdict_key(prepared, Policy(**policy))
    with suppress(CategoryStopped):  # the verdict is kept and says so
        assert validate.fn(prepared, Policy(**policy)).verdict == key
    kept = from_parquet(store.read_bytes(f"{store.get(key).folder}/samples.parquet"))
    return Verdict(prepared, store.get(key).meta, findings(store, key), {sample.key: sample for sample in kept})


def at(table: pd.DataFrame, kind: str) -> pd.Index:
    """Rows of `train/good`, `test/good` or `test/bent`."""
    return table.index[table["path"].str.startswith(kind)]


# what is found


def test_of_sound_images_there_is_nothing_to_say():
    verdict = judge(facts())
    assert verdict.found.empty
    assert tuple(verdict.found.columns) == FINDINGS
    assert (verdict.meta["accepted"], verdict.meta["rejected"], verdict.meta["warned"]) == (38, 0, 0)
    assert verdict.meta["counts"]["test/bent"] == {"listed": 4, "accepted": 4}
    asked = {e["name"] for e in verdict.meta["expectations"]}
    assert asked == DEFAULTS.keys() - {"suspected_defect", "published_counts"}  # nothing is published of it
    assert all(e["success"] and e["unexpected"] == 0 and e["description"] for e in verdict.meta["expectations"])


def test_another_file_format_is_told_with_the_usual_one():
    table = facts()
    odd = at(table, "test/good")[0]
    table.loc[odd, "format"] = "JPEG"
    verdict = judge(table)
    assert verdict.rules == {"usual_format": [table.loc[odd, "key"]]}
    assert "JPEG file, while the category's training images are PNG" in verdict.reason(table.loc[odd, "key"])
    assert verdict.meta["warned"] == 1


def test_empty_masks_are_taken_for_unknown_and_full_ones_are_told():
    table = facts()
    empty, full, *_ = at(table, "test/bent")
    table.loc[[empty, full], "mask_fraction"] = [0.0, 1.0]
    sound = at(table, "test/good")[0]  # a good image may come with an empty mask
    table.loc[sound, ["mask_state", "mask_width", "mask_height", "mask_fraction"]] = ["file", 64, 64, 0.0]
    verdict = judge(table)
    empty, full = table["key"][[empty, full]]
    assert verdict.rules == {"mask_not_empty": [empty], "mask_not_full": [full]}
    assert "inverted" in verdict.reason(full)
    assert (verdict.kept[empty].mask, verdict.kept[empty].mask_id) == (None, None)
    assert verdict.kept[full].mask_state == "file"


@pytest.mark.parametrize(
    ("marked", "border", "inverted"),
    [
        ([0.97] * 4, [1.0] * 4, [0, 1, 2, 3]),
        ([0.98, 0.03, 0.02, 0.04], [1.0, 0, 0, 0], [0]),  # one of them
        ([0.55, 0.03, 0.02, 0.04], [0.93, 0, 0, 0], [0]),  # around a large defect
        ([0.85, 0.03, 0.02, 0.04], [0.7, 0, 0, 0], [0]),  # around one at the border
        ([0.97, 0.98, 0.96, 0.4], [1.0, 1.0, 1.0, 0.5], [0, 1, 2, 3]),  # the last for what the others are
        ([0.45, 0.6, 0.3, 1.0], [0.5, 0.6, 0.4, 1.0], []),  # large defects; one of the whole image is told otherwise
    ],
)
def test_masks_that_mark_all_around_a_defect_are_taken_for_unknown(marked, border, inverted):
    table = facts()
    rows = at(table, "test/bent")
    table.loc[rows, "mask_fraction"], table.loc[rows, "mask_border"] = marked, border
    verdict, keys = judge(table), list(table["key"][rows])
    assert verdict.rules.get("mask_not_inverted", []) == [keys[i] for i in inverted]
    assert [key for key in keys if verdict.kept[key].mask is None] == [keys[i] for i in inverted]
    for i in inverted[:1]:
        assert "mask_rule = values:0" in verdict.reason(keys[i])
        assert f"{marked[i]:.0%} of the image" in verdict.reason(keys[i])
    trusted = judge(table, rules={"mask_not_inverted": "off"})
    assert all(trusted.kept[key].mask for key in keys)


@pytest.mark.parametrize(
    ("image", "mask", "size", "mask_size", "unclear"),
    [
        (6, 1, (64, 64), (64, 64), True),  # square: nothing tells
        (3, 1, (64, 48), (64, 48), True),  # upside down: nor here
        (8, 1, (64, 48), (48, 64), True),  # drawn on what viewers show
        (6, 1, (64, 48), (64, 48), False),  # drawn on the pixels as they are stored
        (6, 6, (64, 64), (64, 64), False),  # turned alike
        (1, 6, (64, 64), (64, 64), True),  # the mask alone
        (1, 1, (64, 64), (64, 64), False),
    ],
)
def test_a_mask_that_may_be_turned_is_unknown_until_somebody_says(image, mask, size, mask_size, unclear):
    table = facts()
    table[["width", "height"]] = size
    bent = at(table, "test/bent")
    table.loc[bent, ["mask_width", "mask_height"]] = mask_size
    table.loc[bent, ["orientation", "mask_orientation"]] = [image, mask]
    verdict, keys = judge(table), list(table["key"][bent])
    assert verdict.rules == ({"mask_upright": keys} if unclear else {})
    assert all((verdict.kept[key].mask is None) == unclear for key in keys)
    assert not unclear or f"orientation {image} for the image and {mask} for its mask" in verdict.reason(keys[0])
    trusted = judge(table, rules={"mask_upright": "off"})
    assert trusted.rules == ({} if size == mask_size else {"mask_size": keys})


@pytest.mark.parametrize(("severity", "accepted"), [("reject", False), ("warn", True)])
def test_a_mask_of_another_size_never_serves_as_the_truth(severity, accepted):
    table = facts()
    row = at(table, "test/bent")[1]
    table.loc[row, ["mask_width", "mask_height"]] = [32, 64]
    verdict = judge(table, rules={"mask_size": severity})
    key = table.loc[row, "key"]
    assert verdict.rules == {"mask_size": [key]}
    assert "its mask has 32x64 px, the image 64x64" in verdict.reason(key)
    assert (key in verdict.kept) is accepted
    assert not accepted or verdict.kept[key].mask is None


def test_an_unreadable_mask_is_unknown_even_where_nobody_asks():
    table = facts()
    row = at(table, "test/bent")[0]
    table.loc[row, ["mask_state", "mask_problem"]] = ["unreadable", "cut short"]
    table.loc[row, ["mask_width", "mask_height", "mask_fraction"]] = pd.NA
    verdict = judge(table, rules={"mask_known": "off"})
    assert verdict.found.empty
    assert verdict.kept[table.loc[row, "key"]].mask is None


def test_numbers_that_differ_from_the_published_ones_are_named():
    table = facts(train=264, good=21, bent=57)
    assert judge(table, dataset="mvtec_ad", category="grid").found.empty
    verdict = judge(table.drop(at(table, "train/good")[:2]), dataset="mvtec_ad", category="grid")
    (told,) = verdict.found.to_dict("records")
    assert (told["rule"], told["severity"], told["key"], told["path"]) == ("published_counts", "warn", "", "")
    assert told["reason"].startswith("train: 262 images listed, 264 published")
    assert verdict.meta["warned"] == 0
    assert judge(table, dataset="mvtec_ad", category="own").found.empty


def test_numbers_are_compared_by_defect_type_where_those_were_published():
    table = facts(train=3, good=2, bent=4)
    table.loc[at(table, "test/bent")[0], "defect_type"] = "rust"
    counted = counts_table(table, {"train": 3, "test/good": 2, "test/bent": 4}).set_index("subset")
    assert counted.T.to_dict("list") == {
        "train": [3, 3],
        "test/good": [2, 2],
        "test/bent": [3, 4],
        "test/rust": [1, 0],  # of a type that nobody published
    }
    assert counts_table(table, {"test/anomalous": 4})["listed"].tolist() == [4]
    assert counts_table(table, {}).empty


def test_dark_flat_and_blurred_training_images_are_told():
    table = facts()
    dark, flat, blurred, both, sound = at(table, "train/good")[:5]
    table.loc[dark, "brightness"] = 30.0
    table.loc[flat, "contrast"] = 5.0
    table.loc[blurred, "sharpness"] = 6.0
    table.loc[both, ["brightness", "contrast"]] = [250.0, 1.0]
    table.loc[sound, "sharpness"] *= 1.3
    table.loc[at(table, "test/bent"), "brightness"] = 240.0  # the rule is about training images
    verdict = judge(table)
    dark, flat, blurred, both = table["key"][[dark, flat, blurred, both]]
    assert verdict.rules == {
        "usual_brightness": [dark, both],
        "usual_contrast": [flat, both],
        "usual_sharpness": [blurred],
    }
    assert "brightness 30 (mean gray value)" in verdict.reason(dark)
    assert "lighting" in verdict.reason(dark)
    assert "blurred" in verdict.reason(blurred)
    assert verdict.meta["warned"] == 4


def test_images_that_hardly_vary_have_no_outliers_of_a_few_per_cent():
    table = facts()
    table["brightness"], table["contrast"] = 100.0, 30.0
    row = at(table, "train/good")[3]
    table.loc[row, "brightness"] = 104.0
    assert judge(table).found.empty
    table.loc[row, "brightness"] = 130.0
    assert list(judge(table).rules) == ["usual_brightness"]


def test_a_few_training_images_have_no_distribution():
    table = facts(train=9)
    table.loc[at(table, "train/good")[0], "brightness"] = 250.0
    verdict = judge(table)
    assert verdict.found.empty
    assert not {"usual_brightness"} & {e["name"] for e in verdict.meta["expectations"]}


def test_one_physical_part_stays_where_it_is_judged():
    table = facts()
    one, two, alone = at(table, "train/good")[:3]
    held = at(table, "train/good")[3]
    judged = at(table, "test/bent")[0]
    table.loc[held, "split"] = "validation"
    table.loc[[one, held, judged], "part"] = "7"
    table.loc[[two, alone], "part"] = "8"  # twice in one split
    verdict = judge(table)
    one, held, judged = table["key"][[one, held, judged]]
    assert verdict.rules == {"one_split_per_part": [one, held]}
    assert set(verdict.found["severity"]) == {"reject"}
    assert f"shows part 7, as {judged} in test does; taken out of train" in verdict.reason(one)
    assert "taken out of validation" in verdict.reason(held)


def test_a_tile_is_rejected_without_the_others_of_its_file():
    table = facts()
    tiles = at(table, "train/good")[:3]
    table.loc[tiles, "path"] = table.loc[tiles[0], "path"]
    table.loc[tiles, "key"] = [f"{table.loc[tiles[0], 'path']}[{x},0,64,64]" for x in (0, 64, 128)]
    table.loc[tiles[1], "constant"] = True
    verdict = judge(table)
    assert verdict.rules == {"not_constant": [table.loc[tiles[1], "key"]]}
    assert {table.loc[tiles[0], "key"], table.loc[tiles[2], "key"]} <= verdict.kept.keys()
    assert verdict.kept[table.loc[tiles[2], "key"]].box == "128,0,64,64"


def test_names_with_braces_are_told_as_they_are():
    table = facts()
    first, second = at(table, "train/good")[:2]
    table.loc[first, ["path", "key"]] = "train/good/{0}{size}.png"
    table.loc[second, "id"] = table.loc[first, "id"]
    assert "same content as train/good/{0}{size}.png" in judge(table).reason(table.loc[second, "key"])


# near-duplicates


def test_nearly_the_same_picture_in_a_split_is_told_once_with_the_closest():
    table = facts()
    a, b, c, far = at(table, "train/good")[[2, 5, 9, 12]]
    table.loc[b, "perceptual_hash"] = differing(table.loc[a, "perceptual_hash"], 12)
    table.loc[c, "perceptual_hash"] = differing(table.loc[a, "perceptual_hash"], 14)
    table.loc[far, "perceptual_hash"] = differing(table.loc[a, "perceptual_hash"], 14 + 21)
    verdict = judge(table)
    a, b, c = table["key"][[a, b, c]]
    assert verdict.rules == {"near_unique_in_split": [b, c]}
    assert f"nearly the same picture as {a} (12 bits of 256" in verdict.reason(b)
    assert f"nearly the same picture as {b} (2 bits" in verdict.reason(c)
    assert nearly_same(table, 1).isna().all(axis=None)


def test_nearly_the_same_picture_in_train_and_test_is_leakage():
    table = facts()
    learned, held = at(table, "train/good")[[4, 8]]
    table.loc[held, "split"] = "validation"
    bent, good = at(table, "test/bent")[0], at(table, "test/good")[0]
    table.loc[learned, "perceptual_hash"] = differing(table.loc[bent, "perceptual_hash"], 3)
    table.loc[held, "perceptual_hash"] = differing(table.loc[good, "perceptual_hash"], 5)
    verdict = judge(table)
    learned, held, bent, good = table["key"][[learned, held, bent, good]]
    assert verdict.rules == {"near_unique_across_splits": [held, learned] if held < learned else [learned, held]}
    assert f"leakage: nearly the same picture as {bent} in test (3 bits of 256" in verdict.reason(learned)
    assert f"nearly the same picture as {good} in test" in verdict.reason(held)
    rejected = judge(table, rules={"near_unique_across_splits": "reject"})
    assert rejected.meta["rejected"] == 2
    assert {bent, good} <= rejected.kept.keys()


def test_copies_are_copies_and_not_also_nearly_the_same():
    table = facts()
    first, second = at(table, "train/good")[:2]
    for column in ("id", "perceptual_hash"):
        table.loc[second, column] = table.loc[first, column]
    assert judge(table).rules == {"unique_in_split": [table.loc[second, "key"]]}


def test_several_pictures_of_one_part_in_a_split_are_no_news():
    table = facts()
    a, b, c = at(table, "train/good")[[0, 1, 2]]
    table.loc[[a, b], "part"] = "7"
    table.loc[b, "perceptual_hash"] = differing(table.loc[a, "perceptual_hash"], 2)
    assert judge(table).found.empty
    table.loc[c, "perceptual_hash"] = differing(table.loc[b, "perceptual_hash"], 9)
    table.loc[c, "part"] = "8"
    verdict = judge(table)
    assert verdict.rules == {"near_unique_in_split": [table.loc[c, "key"]]}
    assert table.loc[a, "key"] in verdict.reason(table.loc[c, "key"])  # 7 bits, where b lies 9 away


@pytest.mark.parametrize("block", [7, 256])
def test_no_pair_within_the_distance_is_missed(monkeypatch, block):
    monkeypatch.setattr(copies, "_BLOCK", block)
    rng = np.random.default_rng(3)
    n, split = 150, np.array(["test", "validation", "train"])
    near = rng.random((n, 256)) < 0.5
    seeds = rng.integers(0, 40, n)
    bits = near[seeds] ^ (rng.random((n, 256)) < rng.choice([0.02, 0.05, 0.1], (n, 1)))
    table = pd.DataFrame(
        {
            "key": [f"k{i}" for i in range(n)],
            "split": split[rng.integers(0, 3, n)],
            "part": pd.array([None if i % 3 else f"p{i % 30}" for i in range(n)], dtype="string"),
            "perceptual_hash": [row.tobytes().hex() for row in np.packbits(bits, axis=1)],
        },
        index=rng.permutation(1000)[:n],
    )
    limit = distance_limit(unpack(table["perceptual_hash"]), 20)
    assert limit == 20
    found = nearly_same(table, 20)
    apart = (bits[:, None] != bits[None]).sum(axis=2)
    rank = table["split"].map(copies.STAYS).to_numpy()
    part = table["part"].to_numpy(dtype=object, na_value=None)
    told = 0
    for i in range(n):
        within = [j for j in range(i) if rank[j] == rank[i] and (part[i] is None or part[i] != part[j])]
        across = [j for j in range(n) if rank[j] < rank[i]]
        for others, column in ((within, "near_copy"), (across, "near_seen")):
            least = min((int(apart[i, j]) for j in others), default=256)
            name = found.iloc[i]["near_copy_of" if column == "near_copy" else "near_seen_in"]
            if least > limit:
                assert pd.isna(name)
                continue
            told += 1
            assert found.iloc[i][f"{column}_bits"] == least
            assert name in {f"k{j}" for j in others if apart[i, j] == least}
    assert told > 20


def test_the_distance_falls_where_all_images_look_alike():
    assert distance_limit(unpack(pd.Series(hashes(400))), 20) == 20
    assert distance_limit(unpack(pd.Series(hashes(400, variable=60))), 20) < 15
    assert distance_limit(unpack(pd.Series(hashes(400, variable=12))), 20) < 1
    assert distance_limit(unpack(pd.Series(hashes(1) * 400)), 20) < 0
    assert distance_limit(unpack(pd.Series(hashes(1))), 20) < 0
    large = distance_limit(unpack(pd.Series(hashes(5000, variable=60))), 20)  # from drawn pairs
    assert 0 < large < distance_limit(unpack(pd.Series(hashes(100, variable=60))), 20)


@pytest.mark.parametrize("variable", [0, 12, 40, 80])
def test_images_of_an_aligned_product_are_no_near_duplicates(variable):
    table = facts(train=600)
    table["perceptual_hash"] = hashes(len(table), seed=5, variable=variable)
    assert nearly_same(table, 20).isna().all(axis=None)
    one, other = at(table, "train/good")[[10, 500]]
    table.loc[other, "perceptual_hash"] = differing(table.loc[one, "perceptual_hash"], 2)
    # Where many bits vary a copy still stands out; where few do, two bits are what chance does too.
    assert nearly_same(table, 20)["near_copy_of"].count() == (variable >= 40)


def test_a_picture_saved_again_is_found_by_its_pixels(tmp_path):
    def save(path: str, seed: int, how: Callable[[Image.Image], Image.Image] = lambda image: image) -> None:
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        how(Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)).save(tmp_path / "data" / path)

    for i in range(6):
        save(f"part/train/good/{i}.png", i)
    save("part/train/good/small.png", 2, lambda image: image.resize((80, 80)))
    save("part/test/good/0.png", 10)
    save("part/test/good/leak.jpg", 4, lambda image: image.point(lambda value: 0.8 * value))
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tmp_path / "data"), ["part"]).categories
    found = findings(Store(category.store), validate.fn(prepare.fn(category, 64)).verdict)
    near = found[found["rule"].str.startswith("near")].set_index("rule")
    assert near["key"].to_dict() == {
        "near_unique_in_split": "part/train/good/small.png",
        "near_unique_across_splits": "part/train/good/4.png",
    }
    assert "part/train/good/2.png" in near.loc["near_unique_in_split", "reason"]
    assert "part/test/good/leak.jpg in test" in near.loc["near_unique_across_splits", "reason"]


# what follows


def test_a_policy_that_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="unknown rule 'near_unique'; did you mean near_unique_in_split"):
        Policy(rules={"near_unique": "off"})
    with pytest.raises(ValidationError, match="rule readable cannot be 'off': an image that cannot be decoded"):
        Policy(rules={"readable": "off"})
    with pytest.raises(ValidationError, match="'reject', 'warn', 'stop' or 'off'"):
        Policy(rules={"mask_known": "ignore"})
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Policy(min_size=3)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Policy(min_training_images=0)
    assert all(field.description for field in Policy.model_fields.values())
    assert Policy.model_validate(Policy(rules={"mask_known": "off"}).model_dump()).severity("mask_known") == "off"


@pytest.mark.parametrize("severity", ["reject", "warn", "stop", "off"])
def test_the_policy_says_what_follows(severity):
    table = facts()
    row = at(table, "train/good")[0]
    key = table.loc[row, "key"]
    table.loc[row, "format"] = "JPEG"
    verdict = judge(table, rules={"usual_format": severity})
    assert verdict.rules == ({} if severity == "off" else {"usual_format": [key]})
    assert set(verdict.found["severity"]) <= {severity}
    assert (key in verdict.kept) is (severity != "reject")
    assert (verdict.meta["stop"] or "").startswith(f"{key}: JPEG file" if severity == "stop" else "")
    asked = {e["name"]: e for e in verdict.meta["expectations"]}
    assert ("usual_format" in asked) is (severity != "off")
    assert verdict.meta["policy"]["rules"] == {"usual_format": severity}


def test_the_numbers_of_the_policy_are_used():
    table = facts(train=5)
    assert judge(table, min_side=65).meta["stop"].startswith("0 of 5 training images accepted, at least 2 are needed")
    stopped = judge(table, min_training_images=6)
    assert stopped.meta["stop"].startswith("5 of 5 training images accepted, at least 6")
    assert stopped.found.to_dict("records")[-1]["rule"] == "enough_training_images"
    assert stopped.found.to_dict("records")[-1]["severity"] == "stop"
    table = with_comparisons(facts(), Policy())
    rules = {rule.name: rule for rule in rules_for(table, table.iloc[:0], Policy(outlier_deviations=7), 64)}
    assert rules["usual_contrast"].arguments["max_value"] == 7


def test_the_first_of_several_reasons_to_stop_is_told_with_their_number():
    table = facts()
    table.loc[at(table, "train/good")[:3], "constant"] = True
    stop = judge(table, rules={"not_constant": "stop"}).meta["stop"]
    assert "all pixels have the same value" in stop
    assert "and 2 more with the same rule, not_constant" in stop


def test_what_is_rejected_is_not_also_warned_of():
    table = facts()
    row = at(table, "train/good")[0]
    table.loc[row, ["constant", "format", "brightness"]] = [True, "JPEG", 250.0]
    assert judge(table).rules == {"not_constant": [table.loc[row, "key"]]}


def test_every_policy_has_a_verdict_of_its_own():
    prepared = kept_facts(facts())
    own = {verdict_key(prepared, Policy(**given)) for given in ({}, {"min_side": 17}, {"rules": {"mask_known": "off"}})}
    assert len(own) == 3
    assert verdict_key(prepared) == verdict_key(prepared, Policy())
    assert verdict_key(prepared) != verdict_key(replace(prepared, images="images/1"))


def test_a_manifest_does_not_grow_with_the_images():
    sizes = []
    for n in (50, 500):
        table = facts(train=n)
        table.loc[at(table, "train/good"), "note"] = "the alpha channel is opaque and was dropped"
        table.loc[at(table, "train/good")[: n // 2], "constant"] = True
        verdict = judge(table)
        assert (verdict.meta["rejected"], verdict.meta["warned"]) == (n // 2, n - n // 2)
        assert len(verdict.found) == n
        sizes.append(len(json.dumps(verdict.meta)))
    assert sizes[1] < sizes[0] + 100


def test_no_images_at_all_stop_with_one_reason():
    verdict = judge(facts(0, 0, 0))
    assert verdict.meta["stop"].startswith("no image is listed")
    assert list(verdict.rules) == ["enough_training_images", "not_empty"]
    assert (verdict.meta["accepted"], verdict.kept) == (0, {})


def test_findings_of_a_verdict_that_was_never_made(tmp_path):
    with pytest.raises(NotInStore):
        findings(Store(str(tmp_path)), "verdicts/x/y/z")


def test_an_expectation_that_cannot_be_evaluated_is_no_finding():
    rule = Rule("odd", "odd", "warn", "odd", "ExpectColumnValuesToBeBetween", {"column": "path", "min_value": 1})
    with pytest.raises(RuntimeError, match="could not evaluate"):
        ask([rule], {"images": facts(), "counts": counts_table(facts(), {})})


# pages


def test_data_docs_are_written_and_leave_validation_as_it_was(tmp_path):
    table = facts()
    table.loc[at(table, "train/good")[0], "format"] = "JPEG"
    prepared = kept_facts(table, "mvtec_ad", "grid")
    page = build_data_docs(prepared, tmp_path / "docs")
    assert page == tmp_path / "docs/index.html"
    assert "validations" in page.read_text()
    pages = {path.name: path.read_text() for path in (tmp_path / "docs/validations").rglob("*.html")}
    assert len(pages) == 2  # the images, and their numbers
    told = "".join(pages.values())
    assert "images are PNG files" in told
    assert table.loc[at(table, "train/good")[0], "key"] in told
    assert "as many images of each kind as were published" in told
    assert validate.fn(prepared).name == "mvtec_ad/grid"
