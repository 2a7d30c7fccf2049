"""The training loop and the losses: exact where they promise exactness."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from checkpoints import Kept, Killed
from skimage.metrics import structural_similarity
from torch import nn

from al_models.errors import InvalidInput, UnknownName
from al_models.parts import train as module
from al_models.parts.losses import ssim_loss, ssim_map
from al_models.parts.train import Phase, TrainPlan, Turn, hold_out, in_hours, rate, seeded, train, whole_seconds
from al_models.types import Runtime


def network(seed=0):
    """Convolution for the memory format, batch norm for buffers, dropout for the global random numbers."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 1, 1)
        )


def fit(runtime=Runtime(), kill_at=None, validated=True, **changes):  # noqa: B008 (frozen)
    """Learn the mean of two channels of noise; optionally die in the draw of a step."""
    settings = {"steps": 30, "learning_rate": 0.01, "check_every": 4, "checkpoint_every_s": 0.0}
    net, drawn = network(), [0]
    held = torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(99))

    def draw(step, generator):
        drawn[0] += 1
        if drawn[0] == kill_at:
            raise Killed
        return torch.rand(4, 2, 6, 6, generator=generator)

    def loss(batch):
        return ((net(batch) - batch.mean(1, keepdim=True)) ** 2).mean()

    plan = TrainPlan(**(settings | changes))
    validate = (lambda: float(loss(held))) if validated else None
    (history,) = train("fit toy", [Phase("", [Turn(net, loss)], draw, plan, validate)], runtime)
    return net, history


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "max_minutes=10 ends it after ten"),
        ({"max_minutes": 2.0}, "max_minutes=2 ends it before"),
        ({"patience": 5}, "unless held-out images end it earlier; max_minutes=10"),
    ],
)
def test_a_long_training_is_told_once_and_before(changes, told, monkeypatch, caplog):
    monkeypatch.setattr(module, "RATE_AFTER_S", 0.0)
    fit(kill_at=None, steps=3, **changes)
    assert caplog.text == ""  # a short one
    kept = Kept()
    with pytest.raises(Killed):
        fit(Runtime(checkpoints=kept), kill_at=5, steps=10_000_000, checkpoint_every_s=3600.0, **changes)
    (record,) = caplog.records
    assert told in record.getMessage()
    assert re.search(r"10000000 steps take about \d+ h \d+ min at this rate", record.getMessage())
    assert whole_seconds(kept.load()) > 600, "the rate is kept with the first checkpoint"


def test_hours_are_written_for_people():
    assert [in_hours(s) for s in (590, 3600, 7810)] == ["10 min", "1 h 0 min", "2 h 10 min"]


@pytest.mark.parametrize("kill_at", [2, 9, 26])
@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "adam", "weight_decay": 1e-3},
        {"optimiser": "adamw", "schedule": "cosine", "clip": 0.1},
        {"optimiser": "sgd", "schedule": "one_cycle"},
        {"optimiser": "rmsprop", "betas": (0.0, 0.9), "eps": 1e-10},
    ],
)
def test_a_killed_fit_resumes_to_the_same_bits(changes, kill_at):
    whole, history = fit(**changes)
    kept = Kept()
    with pytest.raises(Killed):
        fit(Runtime(checkpoints=kept), kill_at, **changes)
    resumed, resumed_history = fit(Runtime(checkpoints=kept), **changes)
    assert same_bits(whole, resumed)
    assert history == resumed_history


def test_a_fit_killed_twice_resumes_with_its_patience():
    changes = {"steps": 200, "patience": 3, "min_improvement": 0.02, "check_every": 2}
    whole, history = fit(**changes)
    assert history.stopped_by == "patience"
    kept = Kept()
    last = history.losses[-1][0]
    for kill_at in (6, last - 5):  # the second dies in the last step, with all but one look of its patience used up
        with pytest.raises(Killed):
            fit(Runtime(checkpoints=kept), kill_at, **changes)
    resumed, resumed_history = fit(Runtime(checkpoints=kept), **changes)
    assert same_bits(whole, resumed)
    assert history == resumed_history


def test_a_finished_fit_is_not_trained_on():
    kept = Kept()
    whole, _ = fit(Runtime(checkpoints=kept), steps=8)
    again, history = fit(Runtime(checkpoints=kept), kill_at=1, steps=8)  # the first draw would raise
    assert same_bits(whole, again)
    assert history.stopped_by == "steps"


def test_checkpoints_are_written_no_more_often_than_asked():
    kept = Kept()
    fit(Runtime(checkpoints=kept), checkpoint_every_s=3600.0)
    assert kept.saves == 0


@pytest.mark.parametrize("change", [{"runtime": Runtime(seed=1)}, {"learning_rate": 0.02}])
def test_another_trainings_checkpoint_is_refused(change):
    kept = Kept()
    fit(Runtime(checkpoints=kept), steps=4)
    seed = change.pop("runtime", Runtime()).seed
    with pytest.raises(InvalidInput, match="another training's"):
        fit(Runtime(checkpoints=kept, seed=seed), steps=4, **change)


def test_the_callers_random_numbers_are_neither_used_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = fit()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, _ = fit()
    assert same_bits(first, second)


def test_another_seed_gives_another_fit():
    assert not same_bits(fit()[0], fit(Runtime(seed=1))[0])


def scripted(judgements, runtime=Runtime(), **changes):  # noqa: B008 (frozen)
    """Train one weight by +1 a step; the held-out losses are given, and None kills."""
    weight, left, seen = nn.Linear(1, 1, bias=False), iter(judgements), []
    nn.init.zeros_(weight.weight)

    def validate():
        assert not weight.training
        assert not torch.is_grad_enabled()
        seen.append(weight.weight.item())
        judged = next(left)
        if judged is None:
            raise Killed
        return judged

    plan = TrainPlan(**({"steps": 20, "learning_rate": 1.0, "check_every": 2} | changes))
    turn = Turn(weight, lambda batch: -weight.weight.sum())
    (history,) = train("fit one", [Phase("", [turn], lambda step, generator: None, plan, validate)], runtime)
    return weight.weight.item(), history, seen


def test_early_stopping_keeps_the_best_weights():
    kept, history, seen = scripted([3.0, 1.0, 2.0, 1.5, 9.0], patience=2)
    assert (history.stopped_by, history.best_step, [row[0] for row in history.losses]) == ("patience", 4, [2, 4, 6, 8])
    assert kept == seen[1]
    assert seen == sorted(seen)
    assert seen[3] > seen[1]


def test_small_improvements_add_up_against_patience_and_the_best_still_counts():
    _, history, _ = scripted([3.0, 2.6, 2.2, 1.9, 1.8, 1.7, 1.6], patience=3, min_improvement=0.7)
    assert [row[0] for row in history.losses] == [2, 4, 6, 8, 10, 12]  # 3 -> 2.2 counts; 1.9, 1.8, 1.7 do not
    assert history.best_step == 12


def test_a_resumed_fit_still_knows_its_best():
    runtime, changes = Runtime(checkpoints=Kept()), {"patience": 3, "min_improvement": 0.7, "checkpoint_every_s": 0.0}
    with pytest.raises(Killed):
        scripted([3.0, 2.6, 2.2, 1.9, None], runtime, **changes)  # best 1.9, while patience measures from 2.2
    _, history, _ = scripted([2.0, 2.0], runtime, **changes)
    assert (history.stopped_by, history.best_step, history.losses[-1][0]) == ("patience", 8, 12)


def test_without_patience_all_steps_are_made_and_the_last_is_looked_at():
    _, history, _ = scripted([3.0, 4.0, 5.0], steps=5)
    assert (history.stopped_by, history.best_step, [row[0] for row in history.losses]) == ("steps", 2, [2, 4, 5])


def test_without_held_out_images_the_last_weights_stay():
    net, history = fit(validated=False)
    assert (history.stopped_by, history.best_step) == ("steps", 30)
    assert all(math.isnan(row[2]) for row in history.losses)
    assert not net.training


def test_the_training_loss_is_the_mean_since_the_last_look():
    _, history, _ = scripted([3.0, 2.0, 1.0], steps=5, optimiser="sgd", learning_rate=0.5)
    # SGD with momentum 0.9 on a slope of -1: weights 0, .5, 1.45, 2.805, 4.5245
    assert [row[1] for row in history.losses] == pytest.approx([-0.25, -2.1275, -4.5245], rel=1e-5)


def test_it_learns():
    _, history = fit(steps=120, check_every=20)
    assert history.losses[-1][2] < 0.3 * history.losses[0][2]


def test_schedules_are_those_of_torch():
    steps = 50
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.0, total_steps=steps, cycle_momentum=False)
    expected = []
    for _ in range(steps):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if len(expected) < steps:
            cycle.step()
    assert rates("one_cycle", steps) == pytest.approx(expected, rel=1e-9)
    assert rates("cosine", 4) == pytest.approx([1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])
    assert set(rates("constant", 4)) == {1.0}
    assert all(0 < share <= 1 for n in (1, 2, 3) for share in rates("one_cycle", n))


def test_milestones_are_those_of_torch():
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    falling = torch.optim.lr_scheduler.MultiStepLR(optimiser, [16, 18], gamma=0.2)
    expected = []
    for _ in range(20):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        falling.step()
    assert rates("milestones", 20, milestones=(0.8, 0.9), drop=0.2) == pytest.approx(expected)
    assert rates("milestones", 4, milestones=(0.5,), drop=0.1) == pytest.approx([1, 1, 0.1, 0.1])


def rates(schedule, steps, **plan):
    """Shares of the highest rate in each of the steps."""
    plan = TrainPlan(steps=steps, learning_rate=1.0, schedule=schedule, **plan)
    return [rate(plan, step, steps) for step in range(steps)]


def test_clipping_bounds_the_gradient():
    lengths = {}
    for clip in (None, 0.01):
        start, (net, _) = network(), fit(optimiser="sgd", steps=1, learning_rate=1.0, clip=clip, validated=False)
        moved = [a - b for a, b in zip(net.parameters(), start.parameters(), strict=True)]
        lengths[clip] = float(torch.linalg.vector_norm(torch.cat([m.flatten() for m in moved]).detach()))
    assert lengths[None] > 0.02
    assert lengths[0.01] == pytest.approx(0.01, rel=1e-3)


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights():
    net, seen = network(), []

    def loss(batch):
        out = net(batch)
        seen.append(out.dtype)
        return out.float().square().mean()

    plan = TrainPlan(steps=2, learning_rate=0.01)
    phase = Phase("", [Turn(net, loss)], lambda step, generator: torch.rand(4, 2, 6, 6, generator=generator), plan)
    train("fit toy", [phase], Runtime(mixed_precision=True))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_adversaries_take_turns_and_move_only_themselves():
    forger, judge = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        for p in (*forger.parameters(), *judge.parameters()):
            p.fill_(0.5)
    turns = [
        Turn(judge, lambda x: judge(forger(x).detach()).mean(), "judge"),
        Turn(forger, lambda x: -judge(forger(x)).mean(), "forger"),
    ]
    plan = TrainPlan(steps=1, learning_rate=0.1, optimiser="sgd")
    train("fit gan", [Phase("", turns, lambda step, generator: torch.ones(2, 1), plan)], Runtime())
    # The judge goes down its own slope (x' = 1, bias 1); the forger then sees the moved judge, of weight 0.4.
    assert [p.item() for p in judge.parameters()] == pytest.approx([0.4, 0.4])
    assert [p.item() for p in forger.parameters()] == pytest.approx([0.54, 0.54])


def test_a_limit_of_time_counts_all_resumptions(monkeypatch):
    clock = [0.0]

    def monotonic():
        clock[0] += 1.0  # each look at the clock takes a second, and a step looks twice
        return clock[0]

    monkeypatch.setattr("al_models.parts.train.time.monotonic", monotonic)
    changes = {"steps": 100, "max_minutes": 8.5 / 60}
    _, whole = fit(**changes)
    kept = Kept()
    with pytest.raises(Killed):
        fit(Runtime(checkpoints=kept), kill_at=6, **changes)
    _, resumed = fit(Runtime(checkpoints=kept), **changes)
    assert whole.stopped_by == resumed.stopped_by == "time"
    assert whole.losses == resumed.losses
    assert whole.losses[-1][0] == 9


def test_warming_up_is_a_line_to_what_the_schedule_says():
    net, seen = nn.Linear(1, 1, bias=False), []

    def loss(batch):
        seen.append(net.weight.item())
        return -net(batch).mean()  # of slope -1, so a step adds the rate

    plan = TrainPlan(steps=5, learning_rate=0.4, optimiser="sgd", momentum=0.0, warm_up=4)
    train("fit toy", [Phase("", [Turn(net, loss)], lambda step, generator: torch.ones(1, 1), plan)], Runtime())
    assert np.diff(seen) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_progress_begins_and_ends():
    told = []
    fit(Runtime(progress=lambda *now: told.append(now)), steps=5)
    assert told[0] == ("fit toy", 0, 5)
    assert told[-1] == ("fit toy", 5, 5)


def test_a_diverging_fit_says_what_to_change():
    with pytest.raises(InvalidInput, match=r"fit toy: the loss is .* lower learning_rate"):
        fit(optimiser="sgd", learning_rate=1e30)


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(UnknownName, match="adamw"):
        TrainPlan(steps=1, learning_rate=1.0, optimiser="adamv")
    with pytest.raises(UnknownName, match="cosine"):
        TrainPlan(steps=1, learning_rate=1.0, schedule="cosin")
    with pytest.raises(InvalidInput, match="steps = 0"):
        TrainPlan(steps=0, learning_rate=1.0)
    with pytest.raises(InvalidInput, match="learning_rate"):
        TrainPlan(steps=1, learning_rate=0.0)
    with pytest.raises(InvalidInput, match="max_minutes"):
        TrainPlan(steps=1, learning_rate=1.0, max_minutes=0.0)


def test_hold_out_splits_by_seed():
    learn, held = hold_out(237, seed=0)
    assert sorted(learn + held) == list(range(237))
    assert len(held) == 24
    assert hold_out(237, seed=0) == (learn, held)
    assert hold_out(237, seed=1)[1] != held
    assert [len(hold_out(n, seed=0)[1]) for n in (1, 4, 5, 14, 20)] == [0, 0, 1, 1, 2]


def pictures(seed=0, size=48):
    """A texture and a disturbed copy, in [0, 1]."""
    rng = np.random.default_rng(seed)
    a = 0.5 + 0.4 * np.sin(np.arange(size) / 2)[:, None] * np.cos(np.arange(size) / 3)
    b = np.clip(a + rng.normal(0, 0.15, a.shape), 0, 1)
    return a.astype(np.float32), b.astype(np.float32)


@pytest.mark.parametrize(("window", "side"), [("gaussian", 11), ("uniform", 11), ("uniform", 7)])
def test_ssim_is_that_of_scikit_image(window, side):
    a, b = pictures()
    settings = {"gaussian_weights": True, "sigma": 1.5} if window == "gaussian" else {"win_size": side}
    _, expected = structural_similarity(
        a.astype(np.float64), b.astype(np.float64), data_range=1.0, use_sample_covariance=False, full=True, **settings
    )
    found = ssim_map(torch.tensor(a)[None, None], torch.tensor(b)[None, None], side=side, window=window)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-5)
    loss = ssim_loss(torch.tensor(a)[None, None], torch.tensor(b)[None, None], side=side, window=window)
    assert float(loss) == pytest.approx(1 - expected.mean(), abs=1e-5)


def test_ssim_takes_images_that_are_not_square():
    a, b = pictures()
    _, expected = structural_similarity(
        a[:20].astype(np.float64),
        b[:20].astype(np.float64),
        data_range=1.0,
        use_sample_covariance=False,
        full=True,
        gaussian_weights=True,
        sigma=1.5,
    )
    found = ssim_map(torch.tensor(a[:20])[None, None], torch.tensor(b[:20])[None, None])
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-5)


def test_the_gradient_of_ssim_is_its_slope():
    a, b = (torch.tensor(picture)[None, None] for picture in pictures())
    b.requires_grad_()
    ssim_loss(a, b).backward()
    way = b.grad / b.grad.norm()
    with torch.no_grad():
        slope = (ssim_loss(a, b + 0.01 * way) - ssim_loss(a, b - 0.01 * way)) / 0.02
    assert float(slope) == pytest.approx(float(b.grad.norm()), rel=0.01)


def test_ssim_is_float32_under_autocast():
    a, b = (torch.tensor(picture)[None, None] for picture in pictures())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim_map(a, b), ssim_map(a, b.clone()))
        mixed = ssim_map(a, b)
    assert torch.equal(mixed, ssim_map(a, b))


def test_ssim_seen_in_inference_mode_can_still_be_trained_with():
    a, b = (torch.tensor(picture)[None, None] for picture in pictures(size=31))  # a size no other test has cached
    with torch.inference_mode():
        ssim_loss(a, b)
    b.requires_grad_()
    ssim_loss(a, b).backward()
    assert b.grad.abs().sum() > 0


def test_ssim_refuses_what_it_cannot_compare():
    image = torch.zeros(1, 1, 32, 32)
    with pytest.raises(InvalidInput, match="equal"):
        ssim_map(image, image[..., :16])
    with pytest.raises(InvalidInput, match="odd"):
        ssim_map(image, image, side=10)
    with pytest.raises(InvalidInput, match="at most 32"):
        ssim_map(image, image, side=33)
    with pytest.raises(UnknownName, match="gaussian"):
        ssim_map(image, image, window="gausian")


# phases and turns


def staged(runtime=Runtime(), kill_at=None, kills="second"):  # noqa: B008 (frozen)
    """A teacher learns a mean, is measured, and a student learns what it says; optionally die in a step of a phase."""
    teacher, student, steps = network(1), network(2), 12
    measured, drawn = [], {"first": 0, "second": 0}

    def draw(name):
        def of(step, generator):
            drawn[name] += 1
            if name == kills and drawn[name] == kill_at:
                raise Killed
            return torch.rand(4, 2, 6, 6, generator=generator)

        return of

    def phases():
        plan = TrainPlan(steps=steps, learning_rate=0.01, check_every=4, checkpoint_every_s=0.0)
        target = Turn(teacher, lambda x: (teacher(x) - x.mean(1, keepdim=True)).square().mean())
        held = torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(99))
        yield Phase("teacher", [target], draw("first"), plan, lambda: float(target.loss(held)))
        noise = torch.rand(4, 2, 6, 6)
        with torch.no_grad():
            measured.append((noise.sum().item(), float(teacher(noise).std())))
        plan = TrainPlan(steps=steps, learning_rate=0.02, check_every=5, checkpoint_every_s=0.0)
        yield Phase(
            "student",
            [Turn(student, lambda x: (student(x) - teacher(x).detach()).square().mean())],
            draw("second"),
            plan,
        )

    histories = train("fit toy", phases(), runtime)
    return nn.ModuleList([teacher, student]), histories, measured, drawn


@pytest.mark.parametrize(("kills", "kill_at"), [("first", 7), ("second", 1), ("second", 8)])
def test_a_fit_killed_in_any_phase_resumes_to_the_same_bits(kills, kill_at):
    whole, histories, measured, _ = staged()
    kept = Kept()
    with pytest.raises(Killed):
        staged(Runtime(checkpoints=kept), kill_at, kills)
    resumed, resumed_histories, again, _ = staged(Runtime(checkpoints=kept))
    assert same_bits(whole, resumed)
    assert str(histories) == str(resumed_histories)  # NaN is not equal to itself
    assert measured == again, "what lies between two phases sees the same modules and draws the same numbers"


def test_a_phase_that_has_ended_is_not_trained_again():
    kept = Kept()
    with pytest.raises(Killed):
        staged(Runtime(checkpoints=kept), kill_at=8)
    *_, drawn = staged(Runtime(checkpoints=kept))
    assert drawn == {"first": 0, "second": 12 - 7}


def test_each_phase_is_told_by_its_name():
    told = []
    staged(Runtime(progress=lambda *now: told.append(now)))
    assert [now for now in told if now[1] == 12] == [("fit toy: teacher", 12, 12), ("fit toy: student", 12, 12)]


def counted(every, runtime=Runtime(), **own):  # noqa: B008 (frozen)
    """A critic each step and a generator less often, on a slope of -1: each adds its rate to one weight."""
    critic, generator = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for layer in (critic, generator):
        nn.init.zeros_(layer.weight)
    plan = TrainPlan(steps=7, learning_rate=1.0, optimiser="sgd", momentum=0.0, check_every=4)
    turns = [
        Turn(critic, lambda x: -critic(x).sum(), "critic"),
        Turn(generator, lambda x: -2 * generator(x).sum(), "generator", **own, every=every),
    ]
    phase = Phase("", turns, lambda step, generator: torch.ones(1, 1), plan)
    (history,) = train("fit gan", [phase], runtime)
    return critic.weight.item(), generator.weight.item(), history


def test_a_turn_comes_every_so_many_steps():
    assert counted(every=3)[:2] == (7.0, 2 * 2.0)  # in steps 3 and 6
    assert counted(every=1)[:2] == (7.0, 7 * 2.0)


def test_a_turn_learns_by_its_own_plan():
    own = TrainPlan(steps=7, learning_rate=0.25, optimiser="sgd", momentum=0.0, clip=1.0)
    assert counted(every=1, plan=own)[:2] == pytest.approx((7.0, 7 * 0.25), rel=1e-5)


def test_each_turns_losses_are_kept_apart():
    *_, history = counted(every=2)
    # The critic's weight is 0, 1, 2, ... before its steps; the generator's 0, 2, 4 before steps 2, 4, 6.
    assert history.turns == {
        "critic": (pytest.approx(-1.5), pytest.approx(-5.0)),
        "generator": (pytest.approx(-2.0), pytest.approx(-8.0)),
    }
    assert [row[1] for row in history.losses] == pytest.approx([-3.5, -13.0])


def test_a_turn_without_a_step_since_the_last_look_has_no_loss_there():
    *_, history = counted(every=6)
    np.testing.assert_array_equal(history.turns["generator"], [math.nan, 0.0])
    assert [row[1] for row in history.losses] == pytest.approx([-1.5, -5.0])  # the critic's alone


def test_two_turns_of_one_name_are_refused():
    layer = nn.Linear(1, 1)
    turn = Turn(layer, lambda x: layer(x).sum())
    with pytest.raises(InvalidInput, match="two turns are called loss"):
        Phase("", [turn, turn], lambda step, generator: torch.ones(1, 1), TrainPlan(steps=1, learning_rate=1.0))
    with pytest.raises(InvalidInput, match="every = 0"):
        Turn(layer, lambda x: layer(x).sum(), every=0)


def test_the_losses_of_turns_stand_beside_the_curve() -> None:
    """One row a look, through all phases; what has no part in a phase has no loss there."""
    first = module.History(
        ((5, 3.0, math.nan), (10, 2.0, math.nan)), "steps", 10, {"critic": (2.0, 1.5), "loss": (1.0, 0.5)}
    )
    second = module.History(((5, 7.0, math.nan),), "steps", 5, {"encoder": (7.0,)})
    found = module.losses_of_turns([first, second])
    assert list(found) == ["critic", "loss", "encoder"]
    np.testing.assert_array_equal(found["critic"], np.float32([2, 1.5, math.nan]))
    np.testing.assert_array_equal(found["encoder"], np.float32([math.nan, math.nan, 7]))
    assert len(found["loss"]) == len(module.curve_of([first, second]))
    assert module.losses_of_turns([second, second]) == {}
