"""Laws of the split between learning and calibration, whatever the images are."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from storage.samples import Sample
from tasks.core.split import HELD_OUT, fit_and_calibration, with_new_images

names = st.text("0123456789abcdef", min_size=4, max_size=8)
trains = st.sets(names, min_size=2, max_size=60).map(sorted)
seeds = st.integers(0, 2**31)


def sample(name: str, split: str = "train", label: str = "good") -> Sample:
    return Sample(name, f"{split}/{name}.png", "d", "c", split, label, label)  # type: ignore[arg-type]


@given(trains, seeds)
def test_each_training_image_is_learned_from_or_held_out(train: list[str], seed: int) -> None:
    fitted, held_out = fit_and_calibration([sample(name) for name in train], seed)
    assert sorted(fitted + held_out) == train
    assert len(held_out) == max(1, round(HELD_OUT * len(train)))
    assert fitted


@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=2, max_size=60), seeds)
def test_images_of_one_part_stay_together(parts: list[str], seed: int) -> None:
    train = [replace(sample(f"{row:04}"), part=part) for row, part in enumerate(parts)]
    fitted, held_out = fit_and_calibration(train, seed)
    assert sorted(fitted + held_out) == [image.id for image in train]
    assert fitted
    assert held_out
    if len(set(parts)) > 1:
        of = {image.id: image.part for image in train}
        assert not {of[name] for name in fitted} & {of[name] for name in held_out}


@given(trains, seeds, st.randoms(use_true_random=False))
def test_the_draw_depends_on_content_and_seed_alone(train: list[str], seed: int, random: object) -> None:
    samples = [sample(name) for name in train]
    shuffled = samples.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = fit_and_calibration(samples, seed), fit_and_calibration(shuffled, seed)
    assert [set(ids) for ids in first] == [set(ids) for ids in second]


@given(trains, seeds, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_smaller_share_is_part_of_a_larger_one_and_what_calibrates_stays(
    train: list[str], seed: int, one: float, other: float
) -> None:
    samples = [sample(name) for name in train]
    fitted, held_out = fit_and_calibration(samples, seed)
    small, large = (fit_and_calibration(samples, seed, share) for share in sorted((one, other)))
    assert set(small[0]) <= set(large[0]) <= set(fitted)
    assert small[1] == large[1] == held_out
    assert min(2, len(fitted)) <= len(small[0]) <= max(2, min(one, other) * len(fitted) + 1)


@given(trains, seeds, names)
@settings(max_examples=200)
def test_a_new_image_moves_at_most_one_other(train: list[str], seed: int, new: str) -> None:
    """A night's new image may enter or leave the held-out ones, or push one in; the others stay where they were."""
    before = set(fit_and_calibration([sample(name) for name in train], seed)[1])
    after = set(fit_and_calibration([sample(name) for name in {*train, new}], seed)[1])
    moved = (before ^ after) - {new}
    assert len(moved) <= 1


@given(st.lists(st.tuples(names, st.sampled_from("abcdefgh")), min_size=3, max_size=60), st.data(), seeds)
def test_new_images_move_none_of_those_before(images: list[tuple[str, str]], data: st.DataObject, seed: int) -> None:
    of_parts = data.draw(st.booleans())
    everything = [replace(sample(name), part=part if of_parts else None) for name, part in dict(images).items()]
    before = fit_and_calibration(everything[: data.draw(st.integers(2, max(2, len(everything) - 1)))], seed)
    after = with_new_images(everything, seed, *before)
    assert sorted(after[0] + after[1]) == sorted(image.id for image in everything)
    assert after[1]
    own = {image.id: image.part or image.id for image in everything}
    own = own if len(set(own.values())) > 1 else {name: name for name in own}
    if {own[name] for name in before[0]} & {own[name] for name in before[1]}:  # there was but one part
        assert after == fit_and_calibration(everything, seed)
        return
    assert set(before[0]) <= set(after[0])
    assert set(before[1]) <= set(after[1])
    parts = [{own[name] for name in ids} for ids in after]
    assert not parts[0] & parts[1]
    new = {own[image.id] for image in everything} - {own[name] for name in before[0] + before[1]}
    wanted = max(1, round(HELD_OUT * len(set(own.values()))))
    assert len(parts[1]) == max(len({own[name] for name in before[1]}), min(wanted, len(parts[1] - new) + len(new)))


@given(trains, seeds)
def test_with_nothing_new_the_split_stays_and_with_all_held_out_gone_it_is_drawn_anew(
    train: list[str], seed: int
) -> None:
    samples = [sample(name) for name in train]
    fitted, held_out = fit_and_calibration(samples, seed)
    assert with_new_images(samples, seed, fitted, held_out) == (fitted, held_out)
    left = [image for image in samples if image.id not in held_out]
    assert with_new_images(left, seed, fitted, held_out) == fit_and_calibration(left, seed)


@given(trains, st.sets(names, min_size=1, max_size=10), seeds)
def test_an_own_validation_split_calibrates(train: list[str], own: set[str], seed: int) -> None:
    own -= set(train)
    samples = [sample(name) for name in train] + [sample(name, "validation") for name in sorted(own)]
    fitted, held_out = fit_and_calibration(samples, seed)
    if own:
        assert (fitted, held_out) == (train, sorted(own))
        assert with_new_images(samples, seed, train[:1], sorted(own)[:1]) == (fitted, held_out)
    else:
        assert set(held_out) < set(train)


@given(trains, seeds)
def test_nothing_of_the_test_split_is_ever_used(train: list[str], seed: int) -> None:
    samples = [sample(name) for name in train]
    test = [sample(f"t{name}", "test", label) for name in train for label in ("good", "anomalous", "unknown")]
    assert fit_and_calibration(samples + test, seed) == fit_and_calibration(samples, seed)


def test_seeds_draw_differently() -> None:
    samples = [sample(f"{i:04x}") for i in range(100)]
    draws = {tuple(fit_and_calibration(samples, seed)[1]) for seed in range(5)}
    assert len(draws) == 5
