"""Samples: their content names, and catalogues that give back what they were given."""

from __future__ import annotations

import io
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import Damaged
from storage.samples import Sample, content_hash, fingerprint, from_parquet, to_parquet

GOOD = Sample("a" * 32, "grid/train/good/000.png", "mvtec_ad", "grid", "train", "good", "good")
BENT = Sample(
    id="b" * 32,
    path="grid/test/bent/000.png",
    dataset="mvtec_ad",
    category="grid",
    split="test",
    label="anomalous",
    defect_type="bent",
    mask="grid/ground_truth/bent/000_mask.png",
    mask_id="c" * 32,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # no UTF-8 for surrogates; such names are set aside
SAMPLES = st.builds(
    Sample,
    id=st.text("0123456789abcdef", min_size=32, max_size=32),
    path=TEXT | st.sampled_from(["nan", "None", "NA", "null", "", "a,b\n\"c'.png"]),
    dataset=TEXT,
    category=TEXT,
    split=st.sampled_from(["train", "validation", "test"]),
    label=st.sampled_from(["good", "anomalous", "unknown"]),
    defect_type=TEXT,
    mask=st.none() | TEXT,
    mask_id=st.none() | TEXT,
)


def test_the_content_hash_is_the_first_half_of_sha256() -> None:
    assert content_hash(b"abc") == "ba7816bf8f01cfea414140de5dae2223"  # FIPS 180-2, appendix B.1
    assert content_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb924"


def test_a_sample_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        GOOD.split = "test"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sample", "state"),
    [
        (GOOD, "no defect"),
        (BENT, "file"),
        (replace(BENT, mask=None, mask_id=None), "unknown"),
        (replace(GOOD, label="unknown", split="test"), "unknown"),
        (replace(GOOD, mask="m.png"), "file"),
    ],
)
def test_the_mask_is_a_file_no_defect_or_unknown(sample: Sample, state: str) -> None:
    assert sample.mask_state == state


@settings(max_examples=50, derandomize=True)
@given(st.lists(SAMPLES, max_size=5))
def test_a_catalogue_gives_back_the_samples_it_was_given(samples: list[Sample]) -> None:
    assert from_parquet(to_parquet(samples)) == samples


def test_a_catalogue_is_a_table_that_others_can_read() -> None:
    frame = pd.read_parquet(io.BytesIO(to_parquet([GOOD, BENT])))
    assert list(frame.columns) == [f.name for f in fields(Sample)]
    assert list(frame["label"]) == ["good", "anomalous"]
    assert frame["mask"].isna().tolist() == [True, False]


def test_an_empty_catalogue_keeps_its_columns() -> None:
    frame = pd.read_parquet(io.BytesIO(to_parquet([])))
    assert list(frame.columns) == [f.name for f in fields(Sample)]
    assert from_parquet(to_parquet([])) == []


def test_equal_samples_make_equal_bytes() -> None:
    assert to_parquet([GOOD, BENT]) == to_parquet([replace(GOOD), replace(BENT)])


@pytest.mark.parametrize("data", [b"", b"no table", to_parquet([GOOD])[:-9]], ids=["empty", "text", "cut"])
def test_a_damaged_catalogue_says_so(data: bytes) -> None:
    with pytest.raises(Damaged, match=r"not a catalogue of samples .*; delete .* run again"):
        from_parquet(data)


def test_a_table_of_something_else_is_no_catalogue() -> None:
    buffer = io.BytesIO()
    pd.DataFrame({"id": ["a"], "height": [3]}).to_parquet(buffer)
    with pytest.raises(Damaged, match=r"not a catalogue of samples .*height"):
        from_parquet(buffer.getvalue())


def test_the_fingerprint_stays_the_same_over_versions() -> None:
    assert fingerprint([GOOD, BENT]) == "d153dd948569a890"  # a new one would make every stored output be computed again
    assert fingerprint([]) == "e3b0c44298fc1c14"


def test_the_fingerprint_does_not_depend_on_the_order() -> None:
    assert fingerprint([GOOD, BENT]) == fingerprint(iter([BENT, GOOD]))


@pytest.mark.parametrize("name", [f.name for f in fields(Sample)])
def test_the_fingerprint_depends_on_every_field(name: str) -> None:
    other = replace(BENT, **{name: "other"})
    assert fingerprint([GOOD, other]) != fingerprint([GOOD, BENT])


def test_the_fingerprint_counts_samples() -> None:
    assert len({fingerprint([GOOD] * n) for n in range(4)}) == 4


def test_the_fingerprint_tells_no_mask_from_a_mask_named_none() -> None:
    assert asdict(GOOD)["mask"] is None
    assert fingerprint([GOOD]) != fingerprint([replace(GOOD, mask="None")])
    assert fingerprint([GOOD]) != fingerprint([replace(GOOD, mask="")])
