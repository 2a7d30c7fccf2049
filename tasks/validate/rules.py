"""The rules: what is expected of a category's images, asked of a table with one row an image.

`with_comparisons` adds to the facts what follows from comparing an image with its mask and with the others; in these
columns an absent value breaks no rule. What is usual in a category is learned from its own training images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from tasks.core.policy import Policy, Severity
from tasks.validate.copies import BITS, nearly_same, same_content, same_part

_MEASURES = {
    "brightness": ("mean gray value", "look at its lighting and exposure"),
    "contrast": ("standard deviation of the gray values", "look whether it shows the product, or fog, glare or shadow"),
    "sharpness": ("variance of the Laplacian", "look whether it is blurred, noisy or of another surface"),
}
_AROUND = 0.9
"""A mask that marks so much of the image's border surrounds a defect, and does not mark one."""
_MOST = 0.8
"""A mask that marks so much of the image surrounds a defect, too."""
_ENOUGH_FOR_A_DISTRIBUTION = 10
_SMALLEST_SPREAD = 0.02
"""Least spread of the logarithms: a training set that varies by less than 2 % is taken to vary by that."""


@dataclass(frozen=True)
class Rule:
    """What is expected of a category's images, and what follows when it does not hold."""

    name: str
    description: str
    severity: Severity
    reason: str
    """The reason why a row breaks the rule, for people, with its columns filled in; told as it is where the whole table
    breaks the rule."""
    expectation: str
    """Class name in `great_expectations.expectations`."""
    arguments: dict[str, Any]
    table: Literal["images", "counts", "training"] = "images"
    """What it is asked of: all images, the numbers of images, the accepted training images."""
    mask_unknown: bool = False
    """Whether the mask of an accepted image that breaks it is taken for unknown."""


def with_comparisons(facts: pd.DataFrame, policy: Policy) -> pd.DataFrame:
    """The facts with the columns that the rules need beside them, one row an image."""
    table = facts.reset_index(drop=True)
    readable, anomalous = table["readable"].astype(bool), table["label"] == "anomalous"
    size = table["width"].astype("string") + "x" + table["height"].astype("string")
    table["size"] = size.where(readable).astype("category")
    table["shorter_side"] = table[["width", "height"]].min(axis=1).where(readable)
    table["mask_missing"] = _mask_missing(table, anomalous)
    table["slightly_beyond"] = table["beyond"].where(table["beyond"].fillna(0) <= 0.5)
    table["may_be_good"] = table["defect_type"].where(
        (table["label"] == "unknown") & (table["defect_type"] != "unknown")
    )
    table["mask_turned"] = _mask_turned(table, anomalous)
    fits = (table["mask_width"] == table["width"]) & (table["mask_height"] == table["height"])
    told = table["mask_turned"].notna() & (policy.severity("mask_upright") != "off")
    table["mask_fits"] = fits.where(readable & table["mask_width"].notna() & ~told)
    table["marked"] = table["mask_fraction"].where(anomalous)
    table["mask_inverted"] = _mask_inverted(table)
    table = table.join([same_content(table), same_part(table)])
    distinct = table[["other_label", "copy_of", "seen_in", "part_seen_in"]].isna().all(axis=1)
    shown = readable & ~table["constant"].fillna(True) & distinct
    if policy.severity("near_unique_in_split") != "off" or policy.severity("near_unique_across_splits") != "off":
        near = nearly_same(table.loc[shown], policy.near_duplicate_bits)
    else:
        near = nearly_same(table.iloc[:0], 0)
    table = table.join(near)
    for measure in _MEASURES:
        table[f"{measure}_deviation"] = _deviations(table[measure].where(shown & (table["split"] == "train")))
    return table


def counts_table(table: pd.DataFrame, published: Mapping[str, int]) -> pd.DataFrame:
    """Images listed and published, a row a split or defect type: columns subset, listed, published."""
    expected = dict(published)
    by_type = {name for name in published if name.startswith("test/")} - {"test/good", "test/anomalous"}
    if by_type and "test/anomalous" not in published:
        tested = table.loc[(table["split"] == "test") & (table["label"] == "anomalous"), "defect_type"]
        expected |= {name: 0 for name in sorted("test/" + tested.unique()) if name not in published}
    listed = [_listed(table, subset) for subset in expected]
    rows = {"subset": list(expected), "listed": listed, "published": list(expected.values())}
    return pd.DataFrame(rows).astype({"subset": "string", "listed": "int64", "published": "int64"})


def _listed(table: pd.DataFrame, subset: str) -> int:
    split, _, kind = subset.partition("/")
    of_kind = table["label" if kind in ("good", "anomalous") else "defect_type"] == kind
    return int(((table["split"] == split) & (of_kind | (kind == ""))).sum())


def rules_for(table: pd.DataFrame, counts: pd.DataFrame, policy: Policy, image_size: int) -> list[Rule]:
    """The rules to ask of a category, without those that the policy turns off, in the order in which they are told."""
    rules = [
        *_about_files(table, policy, image_size),
        *_about_copies(policy),
        *_about_masks(policy),
        *_about_looks(table, policy),
        *_about_counts(counts, policy),
    ]
    return [rule for rule in rules if rule.severity != "off"]


def enough_training_images(table: pd.DataFrame, accepted: pd.DataFrame, policy: Policy) -> Rule:
    """The rule that is asked last, of the training images that the others left."""
    least, listed = policy.min_training_images, (table["split"] == "train").sum()
    return Rule(
        "enough_training_images",
        f"at least {least} good training images are accepted",
        policy.severity("enough_training_images"),
        f"{len(accepted)} of {listed} training images accepted, at least {least} are needed; add good images to learn "
        f"from, or see why they were rejected",
        "ExpectTableRowCountToBeBetween",
        {"min_value": least},
        "training",
    )


def reasons(rule: Rule, rows: pd.DataFrame) -> Iterator[str]:
    """Why each of the rows breaks the rule."""
    names = [name for name in rows.columns if f"{{{name}" in rule.reason]
    columns = [rows[name].astype(object) for name in names]
    for values in zip(rows.index, *columns, strict=True):
        yield rule.reason.format(**dict(zip(names, values[1:], strict=True)))


def _about_files(table: pd.DataFrame, policy: Policy, image_size: int) -> list[Rule]:
    rules = [
        Rule(
            "not_empty",
            "the category has images",
            policy.severity("not_empty"),
            "no image is listed; put good images where the layout has those to learn from",
            "ExpectTableRowCountToBeBetween",
            {"min_value": 1},
        ),
        _in_set(policy, "readable", "images can be decoded", "{problem}", "readable", True),
        Rule(
            "large_enough",
            f"images have at least {policy.min_side} px on each side",
            policy.severity("large_enough"),
            f"{{size}} px; at least {policy.min_side} on each side are needed: export it in full size",
            "ExpectColumnValuesToBeBetween",
            {"column": "shorter_side", "min_value": policy.min_side},
        ),
        _in_set(
            policy,
            "not_constant",
            "images show something",
            "all pixels have the same value, where a picture was expected; look for a covered lens or an empty export",
            "constant",
            False,
        ),
        _empty(policy, "nothing_changed", "images are decoded as they are", "{note}", "note"),
    ]
    return rules + _about_what_is_usual(table, policy, image_size)


def _about_what_is_usual(table: pd.DataFrame, policy: Policy, image_size: int) -> list[Rule]:
    form, bits, channels = (_usual(table, column) for column in ("format", "bit_depth", "n_channels"))
    if form is None:
        return []
    color = {1: "gray", 3: "colour"}.get(channels, f"of {channels} channels")
    those = "while the category's training images"
    return [
        _in_set(
            policy,
            "usual_format",
            f"images are {form} files",
            f"{{format}} file, {those} are {form}; compression leaves traces of its own: export it like them",
            "format",
            form,
        ),
        _about_size(table, policy, image_size),
        _in_set(
            policy,
            "usual_channels",
            f"images are {color}",
            f"{{n_channels}} channels, {those} are {color}; see whether another camera or export made it",
            "n_channels",
            channels,
        ),
        _in_set(
            policy,
            "usual_bit_depth",
            f"images have {bits} bits a channel",
            f"{{bit_depth}} bits a channel, {those} have {bits}; export it like them",
            "bit_depth",
            bits,
        ),
        *_about_range(table, policy),
    ]


def _about_range(table: pd.DataFrame, policy: Policy) -> list[Rule]:
    """The rule that values of more than 8 bits lie in the range that was learned from the good images."""
    known = table["white"].dropna()
    end = f"{known.iloc[0]:g}" if len(known) else "255"
    learned = f"0 to {end}, the range learned from the good training images"
    reason = f"{{beyond:.2%}} of its values lie above {learned}, the largest is {{highest:g}}"
    return [
        Rule(
            name,
            f"{what} in {learned}",
            policy.severity(name),
            f"{reason}; {advice}",
            "ExpectColumnValuesToBeBetween",
            {"column": column, "max_value": most},
        )
        for name, what, advice, column, most in (
            (
                "usual_range",
                "most values of an image lie",
                "it was exported in another range: export it anew",
                "beyond",
                0.5,
            ),
            (
                "in_range",
                "all values lie",
                "they were taken for white: see to exposure and export",
                "slightly_beyond",
                0,
            ),
        )
    ]


def _about_size(table: pd.DataFrame, policy: Policy, image_size: int) -> Rule:
    """The rule on one size where half the training images have it; else there is nothing unusual, and one remark on
    it."""
    size, severity = _usual(table, "size"), policy.severity("usual_size")
    training = table["size"][table["readable"] & (table["split"] == "train")]
    if 2 * (training == size).sum() >= len(training):
        reason = f"{{size}} px, while the category's training images have {size}; see whether it was cropped or scaled"
        return _in_set(policy, "usual_size", f"images have {size} px", reason, "size", size)
    return Rule(
        "usual_size",
        "images have one size",
        "warn" if severity == "reject" else severity,  # it is about all images, and they cannot all be unusual
        f"images have {table['size'].nunique()} sizes; each was resized to {image_size}x{image_size} px, its aspect "
        f"ratio not kept: crop them alike if that distorts what matters",
        "ExpectColumnUniqueValueCountToBeBetween",
        {"column": "size", "max_value": 1},
    )


def _about_copies(policy: Policy) -> list[Rule]:
    similar = f"bits of {BITS} differ between their perceptual hashes"
    return [
        _empty(
            policy,
            "one_label",
            "no content has two labels in test",
            "{label}, but {other_label} has the same content; keep the copy that is right",
            "other_label",
        ),
        _empty(
            policy,
            "unique_in_split",
            "no content appears twice in a split",
            "same content as {copy_of}, which is kept; remove one of them",
            "copy_of",
        ),
        _empty(
            policy,
            "unique_across_splits",
            "no content appears in two splits",
            "same content as {seen_in}; taken out of {split} so that the images judged stay unseen and the same",
            "seen_in",
        ),
        _empty(
            policy,
            "one_split_per_part",
            "no physical part is shown in two splits",
            "shows part {part}, as {part_seen_in} in {part_seen_split} does; taken out of {split} so that what is "
            "judged stays unseen: keep all images of a part in one split",
            "part_seen_in",
        ),
        _empty(
            policy,
            "near_unique_in_split",
            "no split has nearly the same picture twice",
            f"nearly the same picture as {{near_copy_of}} ({{near_copy_bits}} {similar}), so that it adds little and "
            f"counts twice; look at both and keep one unless they are two parts",
            "near_copy_of",
        ),
        _empty(
            policy,
            "near_unique_across_splits",
            "no two splits have nearly the same picture",
            f"leakage: nearly the same picture as {{near_seen_in}} in {{near_seen_split}} ({{near_seen_bits}} "
            f"{similar}), so that results on that image look better than they are; look at both, and if they show "
            f"one part keep them in one split",
            "near_seen_in",
        ),
    ]


def _about_masks(policy: Policy) -> list[Rule]:
    return [
        _empty(
            policy,
            "label_known",
            "it is known which test images are good",
            "of the kind {may_be_good}, which may mean good, so it is judged but counts in no figure; with the data "
            "set `folder` say --option good={may_be_good} where such images are good, --option 'good=[]' where they "
            "are defective, or call the folder good",
            "may_be_good",
        ),
        _in_set(
            policy,
            "mask_size",
            "masks have the size of their image",
            "its mask has {mask_width}x{mask_height} px, the image {size}; draw the mask on the image itself",
            "mask_fits",
            True,
            mask_unknown=True,
        ),
        _empty(
            policy,
            "mask_known",
            "anomalous images have a mask",
            "{mask_missing}; it counts for the image's figures only, not for the pixels'",
            "mask_missing",
            mask_unknown=True,
        ),
        Rule(
            "mask_not_empty",
            "masks of anomalous images mark something",
            policy.severity("mask_not_empty"),
            "its mask marks no pixel though the image is anomalous, so it is taken for unknown; mark the defect, or "
            "say which of the mask's values stand for it, such as mask_rule = nonzero",
            "ExpectColumnValuesToBeBetween",
            {"column": "marked", "min_value": 0, "strict_min": True},
            mask_unknown=True,
        ),
        Rule(
            "mask_not_full",
            "masks of anomalous images leave something unmarked",
            policy.severity("mask_not_full"),
            "its mask marks every pixel, though a defect was expected to be a part of the image; see whether the mask "
            "is inverted, or which of its values stand for the defect",
            "ExpectColumnValuesToBeBetween",
            {"column": "marked", "max_value": 1, "strict_max": True},
        ),
        _empty(
            policy,
            "mask_not_inverted",
            "masks mark the defect, and not all around it",
            "{mask_inverted}, so it is taken for unknown; say mask_rule = values:0 (or below:128) where black stands "
            "for the defect, or turn off the rule mask_not_inverted where the masks are right",
            "mask_inverted",
            mask_unknown=True,
        ),
        _empty(
            policy,
            "mask_upright",
            "masks lie on the pixels as they are stored",
            "{mask_turned}, so it is taken for unknown; save image and mask upright, without the tag, or turn off the "
            "rule mask_upright where masks are drawn on the pixels as they are stored",
            "mask_turned",
            mask_unknown=True,
        ),
    ]


def _about_looks(table: pd.DataFrame, policy: Policy) -> list[Rule]:
    """The rules on brightness, contrast and sharpness of the training images against their own distribution."""
    rules = []
    for measure, (meaning, advice) in _MEASURES.items():
        known = table[f"{measure}_deviation"].notna()
        if not known.any():
            continue
        middle, spread = _robust(table.loc[known, measure])
        low, high = (np.expm1(middle + sign * policy.outlier_deviations * spread) for sign in (-1, 1))
        rules.append(
            Rule(
                f"usual_{measure}",
                f"the training images' {measure} ({meaning}) is within {policy.outlier_deviations:g} robust "
                f"deviations: {max(0, low):.4g} to {high:.4g}",
                policy.severity(f"usual_{measure}"),  # type: ignore[arg-type]
                f"{measure} {{{measure}:.4g}} ({meaning}), {{{measure}_deviation:.1f}} robust deviations from the "
                f"{np.expm1(middle):.4g} of the training images, where {max(0, low):.4g} to {high:.4g} was expected; "
                f"{advice}, and remove it if it is not what good looks like",
                "ExpectColumnValuesToBeBetween",
                {"column": f"{measure}_deviation", "max_value": policy.outlier_deviations},
            )
        )
    return rules


def _about_counts(counts: pd.DataFrame, policy: Policy) -> list[Rule]:
    if counts.empty:
        return []
    return [
        Rule(
            "published_counts",
            "there are as many images of each kind as were published",
            policy.severity("published_counts"),
            "{subset}: {listed} images listed, {published} published; see which are missing or were added, or get the "
            "data set again",
            "ExpectColumnPairValuesToBeEqual",
            {"column_A": "listed", "column_B": "published"},
            "counts",
        )
    ]


def _in_set(
    policy: Policy, name: str, description: str, reason: str, column: str, value: object, *, mask_unknown: bool = False
) -> Rule:
    arguments = {"column": column, "value_set": [value]}
    expectation = "ExpectColumnValuesToBeInSet"
    return Rule(
        name, description, policy.severity(name), reason, expectation, arguments, "images", mask_unknown=mask_unknown
    )


def _empty(
    policy: Policy, name: str, description: str, reason: str, column: str, *, mask_unknown: bool = False
) -> Rule:
    expectation = "ExpectColumnValuesToBeNull"
    return Rule(
        name,
        description,
        policy.severity(name),
        reason,
        expectation,
        {"column": column},
        "images",
        mask_unknown=mask_unknown,
    )


def _mask_missing(table: pd.DataFrame, anomalous: pd.Series) -> pd.Series:
    missing = pd.Series(pd.NA, index=table.index, dtype="string")
    missing[anomalous & (table["mask_state"] == "unknown")] = "there is no mask for it"
    unreadable = table["mask_state"] == "unreadable"
    missing[unreadable] = "its mask cannot be read: " + table["mask_problem"][unreadable]
    return missing


def _mask_inverted(table: pd.DataFrame) -> pd.Series:
    """The reason why a mask seems to mark all but the defect; where most masks of a category seem to, the others are in
    doubt, too."""
    reasons = pd.Series(pd.NA, index=table.index, dtype="string")
    partly = ((table["marked"] > 0) & (table["marked"] < 1)).fillna(False)
    around = partly & ((table["mask_border"] >= _AROUND) | (table["marked"] >= _MOST)).fillna(False)
    if around.sum() > 0.5 * partly.sum():
        reasons[partly] = f"{around.sum()} of the category's {partly.sum()} masks mark all around a defect"
    shares = table.loc[around, ["marked", "mask_border"]].astype(float)
    reasons[around] = [
        f"its mask marks {marked:.0%} of the image and {border:.0%} of its border, as an inverted one does"
        for marked, border in shares.itertuples(index=False)
    ]
    return reasons


def _mask_turned(table: pd.DataFrame, anomalous: pd.Series) -> pd.Series:
    """The reason why it is not known which way up a mask lies: EXIF tells viewers to turn the image, or the mask.

    Tags of 5 and more turn by a quarter, so that the size of a mask shows what it was drawn on unless it is square.
    """
    why = pd.Series(pd.NA, index=table.index, dtype="string")
    image, mask = table["orientation"].fillna(1), table["mask_orientation"].fillna(1)
    quarter = (image >= 5) & (mask == 1) & (table["width"] != table["height"])
    as_stored = quarter & (table["mask_width"] == table["width"]) & (table["mask_height"] == table["height"])
    shown = quarter & (table["mask_width"] == table["height"]) & (table["mask_height"] == table["width"])
    of = anomalous & table["mask_width"].notna()
    unclear = (of & (image != mask) & ~as_stored & (shown | ~quarter)).fillna(False)
    tags = (
        "EXIF orientation " + image.astype("string") + " for the image and " + mask.astype("string") + " for its mask"
    )
    why[unclear] = tags + ", neither applied: whether the mask lies on the picture as stored or as shown is not known"
    return why


def _usual(table: pd.DataFrame, column: str) -> Any:
    """The most common value among the readable training images, or among all; the smaller one of a tie."""
    readable = table.loc[table["readable"].astype(bool), [column, "split"]].astype({column: object})
    training = readable.loc[readable["split"] == "train", column]
    counts = (training if len(training) else readable[column]).value_counts()
    return min(counts.index[counts == counts.max()], default=None)


def _deviations(values: pd.Series) -> pd.Series:
    """How far each value lies from the median, in robust standard deviations; absent where there are too few.

    Of the logarithms, because sharpness and contrast have long upper tails on clean data.
    """
    known = values.dropna()
    if len(known) < _ENOUGH_FOR_A_DISTRIBUTION:
        return pd.Series(pd.NA, index=values.index, dtype="Float64")
    middle, spread = _robust(known)
    return (pd.Series(np.log1p(known), dtype="Float64") - middle).abs().div(spread).reindex(values.index)


def _robust(values: pd.Series) -> tuple[float, float]:
    """Median, and standard deviation by the median absolute deviation, of log(1 + value)."""
    logs = np.log1p(values.to_numpy(dtype=np.float64))
    middle = float(np.median(logs))
    return middle, max(_SMALLEST_SPREAD, 1.4826 * float(np.median(np.abs(logs - middle))))
