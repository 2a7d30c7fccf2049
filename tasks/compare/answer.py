"""The answer: which method is best, how certain that is, and what bears it out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tasks.compare.comparison import BETTER, EQUAL, UNKNOWN, WORSE, Contest, Difference
from tasks.compare.tables import DECIDING, METRICS, RankedRow, Ranking, percent
from tasks.compare.variants import Variant

_NAMED = 4


def headline(ranking: Ranking, contest: Contest | None = None) -> tuple[str, list[str]]:
    """The answer in one sentence, and the sentences that bear it out.

    `contest`: the best method against the others, over all categories (`comparison.overall`). Without it nothing is
    said of how certain the order is.
    """
    if not ranking.rows:
        return "No cell has been run yet.", []
    if not ranking.ranked_by:
        if not any(row.finished for row in ranking.rows):
            return "Nothing finished: every cell failed, for the reasons below.", []
        return "These methods cannot be ranked: no image is known to be anomalous, so there is nothing to judge by.", []
    winners = ranking.winners
    if not winners:
        return "No method was run in every category, so no best one can be named.", []
    if not any(row.finished for row in winners):
        return "Nothing finished: every cell failed, for the reasons below.", []
    if len(ranking.rows) == 1:
        return f"Only one method was run: {winners[0].variant.name}.", _support(ranking, None)
    return _answer(winners, contest), _support(ranking, contest)


def _answer(winners: Sequence[RankedRow], contest: Contest | None) -> str:
    names = " and ".join(row.variant.name for row in winners) + (" (equal)" if len(winners) > 1 else "")
    first, metric = winners[0].variant.name, "" if contest is None else heading(contest.metric)
    if contest is not None and (equal := contest.named(EQUAL)):
        return f"First on this data: {names}; {listed(equal)} cannot be told apart from {first} in {metric}."
    if contest is not None and (higher := contest.named(WORSE)):
        verb = "has" if len(higher) == 1 else "have"
        return f"First on this data: {names}; {listed(higher)} {verb} the higher mean {metric} but a lower place."
    return f"Best on this data: {names}."


def heading(metric: str) -> str:
    """The heading of a metric, or of several joined by `or`."""
    return " or ".join(METRICS.get(one, one) for one in metric.split(" or "))


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; of many the first few and how many more."""
    if len(names) > _NAMED:
        names = [*names[:_NAMED], f"{len(names) - _NAMED} more"]
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def _support(ranking: Ranking, contest: Contest | None) -> list[str]:
    winners, count = ranking.winners, len(ranking.ranked_by)
    first, judged = winners[0], list(dict.fromkeys(ranking.ranked_by.values()))
    by = " or ".join(METRICS[metric] for metric in judged)
    lines = [
        f"Average rank {first.rank:.2f} over {count} {'category' if count == 1 else 'categories'}, judged by {by}."
    ]
    means = [f"{METRICS[m]} {percent(v.mean)} %" for m, v in first.values.items() if m in DECIDING]
    lines.append(f"Its means: {', '.join(means)}.")
    if len(ranking.complete) > len(winners) == 1 and (lead := _lead(first, ranking.complete[1], judged[0])):
        lines.append(lead)
    lines += [] if contest is None else _certainty(ranking, contest)
    lines += _at_threshold(first.variant)
    if first.failed_cells:
        lines.append(f"{first.failed_cells} of its {len(first.variant.records)} cells failed.")
    return lines


def _lead(first: RankedRow, second: RankedRow, metric: str) -> str | None:
    ours, theirs = first.values.get(metric), second.values.get(metric)
    if ours is None or theirs is None or first.finished != second.finished:
        return None
    points = 100 * (ours.mean - theirs.mean)
    spread = 100 * max(ours.spread or 0.0, theirs.spread or 0.0)
    name = second.variant.name
    if points < 0:
        return f"{name}, the next, has the higher mean {METRICS[metric]} (by {-points:.1f} points), but places lower."
    words = f"Its lead over the next, {name}, is {points:.1f} points of {METRICS[metric]}"
    return f"{words}: no more than the spread between seeds ({spread:.1f})." if points <= spread else f"{words}."


def _certainty(ranking: Ranking, contest: Contest) -> list[str]:
    """Sentences: whether the next method can be told apart from the best, and how many of the others can."""
    metric, by_name = heading(contest.metric), {one.name: one for one in contest.against}
    following = [row.variant.name for row in ranking.complete if row.variant.name in by_name]
    if not following:
        return []
    lines = [_next(by_name[following[0]], metric, contest)]
    if len(contest.against) > 1:
        counts = [(len(contest.named(words)), words) for words in (BETTER, WORSE, EQUAL, UNKNOWN)]
        said = {BETTER: "worse", WORSE: "better", EQUAL: EQUAL, UNKNOWN: UNKNOWN}
        told = ", ".join(f"{n} {said[words]}" for n, words in counts if n)
        lines.append(f"Of the {len(contest.against)} other methods, compared with it on the same images: {told}.")
    return lines


def _next(one: Difference, metric: str, contest: Contest) -> str:
    first = contest.best
    if one.points is None:
        return f"Whether {first} and {one.name} differ by more than chance is not known: {one.note}."
    if one.low is None or one.high is None:
        return f"Whether {first} and {one.name} differ by more than chance cannot be told: {one.note}."
    ends = f"95 % interval {100 * one.low:+.1f} to {100 * one.high:+.1f} points of {metric}"
    p = "no p-value" if one.p_value is None else "p < 0.001" if one.p_value < 0.001 else f"p = {one.p_value:.2g}"
    p += " after Holm's correction" if len(contest.against) > 1 else ""
    said = {
        EQUAL: f"{first} and {one.name} cannot be told apart on these images",
        WORSE: f"On these images {one.name} is the better of the two in the mean",
    }
    return f"{said.get(one.words, f'{first} beats {one.name} by more than chance')} ({ends}; {p})."


def _at_threshold(variant: Variant) -> list[str]:
    calibrations = [record.calibration for record in variant.records if record.status == "done"]
    asked = [rate for c in calibrations if (rate := (c.get("image") or {}).get("rate")) is not None]
    rejected = [rate for c in calibrations if (rate := (c.get("realised") or {}).get("false_reject_rate")) is not None]
    missed = [rate for c in calibrations if (rate := (c.get("realised") or {}).get("miss_rate")) is not None]
    if not asked or not rejected:
        return []
    words = f"Asked to reject {percent(statistics.fmean(asked))} % of good parts, it rejected "
    words += f"{percent(statistics.fmean(rejected))} % of the good test images"
    return [words + (f" and missed {percent(statistics.fmean(missed))} % of the anomalous ones." if missed else ".")]
