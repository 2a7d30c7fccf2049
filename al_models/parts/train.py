"""One training loop for every detector that learns by gradient descent.

A training is a row of phases; in each step of a phase, modules take turns on one batch. The caller brings the modules,
their losses, a way to draw a training batch and a way to judge held-out good images; the loop brings everything else:
seeds, optimisers, learning rates, clipping, mixed precision, channels-last, early stopping with the best weights kept,
a limit of steps and of time, progress, and checkpoints. A fit that was killed and resumed in any phase ends with the
same bits on a CPU as one that was not, because all that the next step depends on is in the checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import al_models.parts.precision  # noqa: F401 (full float32 on GPUs)
from al_models.errors import InvalidInput, unknown
from al_models.types import Checkpoints, Runtime

OPTIMISERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
SCHEDULES = ("constant", "cosine", "milestones", "one_cycle")
RATE_AFTER_S = 5.0
"""Seconds of training after which its rate is taken as known, and its whole time is announced."""
LONG_S = 600.0
"""Seconds of a whole training from which on they are announced."""

logger = logging.getLogger(__name__)

Draw = Callable[[int, torch.Generator], Any]
"""(step, generator on the CPU) -> a training batch; the same step and an equal generator give the same batch."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How long and how fast to learn. Raises InvalidInput or UnknownName for values that make no sense."""

    steps: int
    """Batches at most."""
    learning_rate: float
    """The highest learning rate of the schedule."""
    optimiser: str = "adam"
    """adam, adamw, rmsprop or sgd."""
    momentum: float = 0.9
    """Share of the running gradient that sgd keeps a step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Shares of the mean gradient and the mean square that adam and adamw keep a step; rmsprop keeps the second."""
    eps: float = 1e-8
    """Term that adam, adamw and rmsprop add to the root that they divide by."""
    weight_decay: float = 0.0
    """Added to the gradient (adam, rmsprop, sgd) or taken from the weights (adamw)."""
    schedule: str = "constant"
    """constant, cosine (to 0), milestones, or one_cycle (Smith & Topin 2019: 30 % up from 1/25, then down to
    1/250000)."""
    milestones: tuple[float, ...] = (0.8, 0.9)
    """Shares of the steps after each of which the rate drops, with the schedule `milestones`."""
    drop: float = 0.2
    """What is left of the rate at a milestone, as a share of what it was."""
    warm_up: int = 0
    """Steps at the start in which the rate rises linearly to that of the schedule."""
    max_minutes: float | None = None
    """Minutes of training, over all resumptions, after which to stop; None: no limit. Where it stops a training, the
    result depends on the machine's speed."""
    clip: float | None = None
    """L2 norm that the gradient of a module is clipped to; None: no clipping."""
    check_every: int = 100
    """Steps from one look at the held-out images to the next."""
    patience: int | None = None
    """Looks without improvement after which to stop; None: never."""
    min_improvement: float = 0.0
    """How much lower, in the loss's own units, counts as an improvement."""
    checkpoint_every_s: float = 60.0
    """Seconds from one checkpoint to the next."""

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name in ("steps", "check_every"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} = {getattr(self, name)}; a training needs at least 1")
        for name in ("learning_rate", "max_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidInput(f"{name} = {value}; give a positive number")


@dataclass(frozen=True)
class Turn:
    """A module and the loss that it lowers. Most phases have one turn a step, adversarial ones two."""

    module: nn.Module
    loss: Callable[[Any], torch.Tensor]
    """Batch -> scalar."""
    name: str = "loss"
    """Name of the loss where it is shown beside others."""
    plan: TrainPlan | None = None
    """Optimiser, rates and clip of its own; None: those of the phase. The number of steps and of looks is always the
    phase's."""
    every: int = 1
    """Steps of the phase from one of its own to the next, the first of which is step number `every`; a critic of 1
    beside a generator of 5 learns five times as often."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InvalidInput(f"every = {self.every} was given for the turn {self.name}; a turn comes every 1 or more")


@dataclass(frozen=True)
class Phase:
    """One stage of a training: the modules that learn, their batches, and the plan."""

    name: str
    """Name that progress reports show; empty where there is only one phase."""
    turns: Sequence[Turn]
    draw: Draw
    plan: TrainPlan
    validate: Callable[[], float] | None = None
    """Loss of the modules on held-out images (lower is better; called without gradients, in eval mode); None: all steps
    are made, and the last weights stay."""

    def __post_init__(self) -> None:
        names = [turn.name for turn in self.turns]
        for name in names:
            if names.count(name) > 1:
                raise InvalidInput(f"two turns are called {name}; give each a name of its own")


@dataclass(frozen=True)
class History:
    """The course of a phase."""

    losses: tuple[tuple[int, float, float], ...]
    """(step, mean training loss of all turns since the last look, validation loss); NaN where nothing was held out."""
    stopped_by: str
    """Limit that ended it: `patience`, `steps` or `time`."""
    best_step: int
    """Step whose weights were kept."""
    turns: Mapping[str, tuple[float, ...]]
    """Name of a turn -> its own mean loss at each look, over the steps in which it was its turn; NaN where it had none
    since the last."""


def curve_of(histories: Iterable[History]) -> np.ndarray:
    """The losses of all phases, one after the other, their steps counted on: float32 (looks, 3)."""
    rows, before = [np.zeros((0, 3))], 0
    for history in histories:
        own = np.array(history.losses, np.float64).reshape(-1, 3)
        rows.append(own + np.array([before, 0, 0]))
        before += int(own[-1, 0]) if len(own) else 0
    return np.concatenate(rows).astype(np.float32)


def train(what: str, phases: Iterable[Phase], runtime: Runtime) -> list[History]:
    """Train the modules of one phase after the other in place, and leave them on the device, in eval mode, with their
    best weights.

    `phases` may be a generator, which is resumed when a phase has ended: code between two phases sees the modules as
    learned and draws the same random numbers, also in a training that resumes after it was killed. Raises InvalidInput
    when a loss stops being finite, or when the checkpoint is another training's.
    """
    device, histories = torch.device(runtime.device), list[History]()
    with seeded(runtime.seed, device):
        chain = _Chain(runtime.checkpoints)
        for number, phase in enumerate(phases):
            training = _Training(f"{what}: {phase.name}" if phase.name else what, phase, runtime)
            saved = chain.of_phase(number)
            if saved is not None:
                training.load_state(saved)
            _run(training, chain.saver(number))
            training.keep_best()
            chain.ended(number, training)
            histories.append(training.history())
            _seed(runtime.seed, device)  # what follows draws alike, whether this phase was learned now or loaded
    return histories


class _Chain:
    """The checkpoints of a training's phases in one place: the state of its current phase, and the ends of those
    before."""

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        self.checkpoints = checkpoints
        self.saved = dict((checkpoints.load() if checkpoints else None) or {})
        self.at = int(self.saved.get("phase", -1))
        self.ends: dict[str, np.ndarray] = {}

    def of_phase(self, number: int) -> dict[str, np.ndarray] | None:
        """The state that a phase was killed in or ended with; None for one that had not begun."""
        if number > self.at:
            return None
        if number == self.at:
            last, self.saved = self.saved, {}  # not kept in memory for as long as the training goes on
            return last
        start = f"ended/{number}/"
        return {name.removeprefix(start): value for name, value in self.saved.items() if name.startswith(start)}

    def saver(self, number: int) -> Callable[[dict[str, np.ndarray]], None] | None:
        """A function that saves a state of this phase; None without checkpoints."""
        checkpoints = self.checkpoints
        if checkpoints is None:
            return None
        return lambda state: checkpoints.save({**state, "phase": np.array(number), **self.ends})

    def ended(self, number: int, training: _Training) -> None:
        """Keep the end of a phase for the checkpoints of the next."""
        if self.checkpoints is not None:
            # Its modules have their best weights by now, and no step follows.
            kept = {
                name: value for name, value in training.state().items() if not name.startswith(("best", "optimiser"))
            }
            self.ends |= {f"ended/{number}/{name}": value for name, value in kept.items()}


def losses_of_turns(histories: Sequence[History]) -> dict[str, np.ndarray]:
    """Name of a turn -> its mean loss at each look of `curve_of`, NaN in phases without it: float32 (looks,). Empty
    where all phases have the same single turn, whose losses are the curve's."""
    names = list(dict.fromkeys(name for history in histories for name in history.turns))
    if len(names) < 2:
        return {}
    nothing = [(math.nan,) * len(history.losses) for history in histories]
    return {
        name: np.concatenate(
            [history.turns.get(name, none) for history, none in zip(histories, nothing, strict=True)]
        ).astype(np.float32)
        for name in names
    }


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """A context in which torch's own random numbers (initial weights, dropout) come from `seed`; outside of it the
    generators are as they were."""
    device = torch.device(device)
    gpus = [_index(device)] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        _seed(seed, device)
        yield


def _seed(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: it would also seed GPUs that are not ours to touch.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)


def hold_out(n: int, seed: int, share: float = 0.1, at_least: int = 5) -> tuple[list[int], list[int]]:
    """Split n rows into (to learn from, to judge by); nothing is held out of fewer than `at_least` rows."""
    if n < at_least:
        return list(range(n)), []
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(n * share))
    return sorted(order[held:]), sorted(order[:held])


def rate(plan: TrainPlan, step: int, steps: int) -> float:
    """The learning rate at `step` of 0 .. steps - 1 by the plan's schedule, as a share of the highest."""
    if plan.schedule == "constant":
        return 1.0
    if plan.schedule == "cosine":
        return _glide(1.0, 0.0, step / steps)
    if plan.schedule == "milestones":
        return plan.drop ** sum(step >= share * steps for share in plan.milestones)
    if plan.schedule == "one_cycle":
        low, peak = 1 / 25, max(0.3 * steps - 1, 1e-9)
        if step <= peak:
            return _glide(low, 1.0, step / peak)
        return _glide(1.0, low / 1e4, (step - peak) / max(steps - 1 - peak, 1e-9))
    raise unknown("schedule", plan.schedule, SCHEDULES)


def _glide(start: float, end: float, share: float) -> float:
    """The value at `share` (0 to 1) of half a cosine from start to end."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _run(training: _Training, save: Callable[[dict[str, np.ndarray]], None] | None) -> None:
    if training.stopped_by():
        return  # it had ended when it was loaded
    progress, plan = training.runtime.progress, training.plan
    to_save, to_tell, told = _Every(plan.checkpoint_every_s), _Every(0.5), False
    progress(training.what, training.step, plan.steps)
    while training.stopped_by() is None:
        training.advance()
        if not told and training.elapsed_s >= RATE_AFTER_S:
            told = True
            _tell_how_long(training)
            if save:  # a killed training tells its rate, too
                save(training.state())
        if training.step % plan.check_every == 0 or training.stopped_by():
            training.look()
        if save and to_save.due():
            save(training.state())
        if to_tell.due():
            progress(training.what, training.step, plan.steps)
    progress(training.what, plan.steps, plan.steps)


def _tell_how_long(training: _Training) -> None:
    """Log, once, that a training will take long at the rate of its first seconds."""
    plan, seconds = training.plan, training.elapsed_s / training.step * training.plan.steps
    if seconds < LONG_S:
        return
    limit = "max_minutes=10 ends it after ten"
    if plan.max_minutes is not None:
        if 60 * plan.max_minutes >= seconds:
            return
        limit = f"max_minutes={plan.max_minutes:g} ends it before"
    stops = ", unless held-out images end it earlier" if plan.patience is not None and training.validate else ""
    logger.warning(
        "%s: %d steps take about %s at this rate%s; %s", training.what, plan.steps, in_hours(seconds), stops, limit
    )


def whole_seconds(state: Mapping[str, np.ndarray]) -> float:
    """Seconds that all steps of a training take at its rate so far, from the state in a checkpoint."""
    plan = json.loads(np.asarray(state["plan"]).tobytes().decode())
    return float(state["elapsed_s"]) / max(1, int(state["counters"][0])) * int(plan["steps"])


def in_hours(seconds: float) -> str:
    """Seconds as text for people: `45 min`, `2 h 10 min`."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class _Every:
    """Due once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


class _Training:
    """The state of a phase between two steps: everything that the next one depends on."""

    def __init__(self, what: str, phase: Phase, runtime: Runtime) -> None:
        self.what, self.turns, self.draw, self.plan = what, phase.turns, phase.draw, phase.plan
        self.runtime, self.validate = runtime, phase.validate
        self.plans = [turn.plan or self.plan for turn in self.turns]
        self.device = torch.device(runtime.device)
        for turn in self.turns:
            turn.module.to(self.device, memory_format=torch.channels_last)
        self.optimisers = [_optimiser(turn.module, plan) for turn, plan in zip(self.turns, self.plans, strict=True)]
        self.generator = torch.Generator().manual_seed(runtime.seed)
        self.step = self.best_step = self.stale = 0
        self.elapsed_s = 0.0
        self.best = self.mark = math.inf  # lowest validation loss, and the one that patience measures from
        self.best_weights: list[dict[str, torch.Tensor]] = []
        self.losses: list[tuple[int, float, float]] = []
        self.turn_losses: list[list[float]] = []
        # Of each turn since the last look; on the device, which no step waits for.
        self.loss_sums = torch.zeros(len(self.turns), device=self.device)
        self._mode(train=True)

    def advance(self) -> None:
        """One step: each module whose turn it is learns from the same batch."""
        start = time.monotonic()
        batch = self.draw(self.step, self.generator)
        for number, (turn, plan, optimiser) in enumerate(zip(self.turns, self.plans, self.optimisers, strict=True)):
            if (self.step + 1) % turn.every:
                continue
            rate_now = plan.learning_rate * rate(plan, self.step, self.plan.steps)
            rate_now *= min(1.0, (self.step + 1) / max(1, plan.warm_up))
            for group in optimiser.param_groups:
                group["lr"] = rate_now
            optimiser.zero_grad()
            with self._precision():
                loss = turn.loss(batch)
            loss.backward()
            if plan.clip is not None:
                nn.utils.clip_grad_norm_(turn.module.parameters(), plan.clip)
            optimiser.step()
            self.loss_sums[number] += loss.detach()
        self.step += 1
        self.elapsed_s += time.monotonic() - start

    def look(self) -> None:
        """Judge the held-out images, note the losses, keep the weights if they are the best so far."""
        since = self.losses[-1][0] if self.losses else 0
        steps = [self.step // turn.every - since // turn.every for turn in self.turns]
        own = [float(total) / n if n else math.nan for total, n in zip(self.loss_sums, steps, strict=True)]
        trained = sum(loss for loss, n in zip(own, steps, strict=True) if n)
        self.loss_sums.zero_()
        judged = self._judge()
        if not math.isfinite(trained) or (self.validate and not math.isfinite(judged)):
            raise InvalidInput(
                f"{self.what}: the loss is {trained} (held-out images: {judged}) at step {self.step}, expected "
                f"finite numbers; lower learning_rate (now {self.plan.learning_rate}) or clip (now {self.plan.clip})"
            )
        self.losses.append((self.step, trained, judged))
        self.turn_losses.append(own)
        if self.validate is None:
            self.best_step = self.step
            return
        self.stale = 0 if judged < self.mark - self.plan.min_improvement else self.stale + 1
        if self.stale == 0:
            self.mark = judged
        if judged < self.best:
            self.best, self.best_step = judged, self.step
            self.best_weights = [_clone(turn.module.state_dict()) for turn in self.turns]

    def stopped_by(self) -> str | None:
        """The limit that ends the phase now: `patience`, `time` or `steps`; None when it goes on."""
        if self.plan.patience is not None and self.stale >= self.plan.patience:
            return "patience"
        if self.plan.max_minutes is not None and self.elapsed_s >= 60 * self.plan.max_minutes:
            return "time"
        return "steps" if self.step >= self.plan.steps else None

    def keep_best(self) -> None:
        """Give the modules their best weights and leave them ready to predict."""
        for turn, weights in zip(self.turns, self.best_weights, strict=False):
            turn.module.load_state_dict(weights)
        self._mode(train=False)

    def history(self) -> History:
        """The course of the phase so far."""
        names = [turn.name for turn in self.turns]
        own = zip(*self.turn_losses, strict=True)
        return History(tuple(self.losses), self.stopped_by() or "", self.best_step, dict(zip(names, own, strict=True)))

    def state(self) -> dict[str, np.ndarray]:
        """All of the state as plain arrays."""
        state = {
            "plan": np.frombuffer(self._identity().encode(), np.uint8),
            "counters": np.array([self.step, self.best_step, self.stale]),
            "marks": np.array([self.best, self.mark]),
            "elapsed_s": np.array(self.elapsed_s),
            "losses": np.array(self.losses, np.float64).reshape(-1, 3),
            "turn_losses": np.array(self.turn_losses, np.float64).reshape(-1, len(self.turns)),
            "loss_sums": _array(self.loss_sums),
            "random/draw": _array(self.generator.get_state()),
            "random/cpu": _array(torch.get_rng_state()),
        }
        if self.device.type == "cuda":
            state["random/cuda"] = _array(torch.cuda.get_rng_state(self.device))
        for index, (turn, optimiser) in enumerate(zip(self.turns, self.optimisers, strict=True)):
            state |= _arrays(f"module/{index}", turn.module.state_dict())
            for number, values in optimiser.state_dict()["state"].items():
                state |= _arrays(f"optimiser/{index}/{number}", values)
        for index, weights in enumerate(self.best_weights):
            state |= _arrays(f"best/{index}", weights)
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state, bit for bit."""
        found = np.asarray(state["plan"]).tobytes().decode()
        if found != self._identity():
            raise InvalidInput(
                f"the checkpoint is another training's: it holds {found}, this is {self._identity()}; "
                "remove it, or give each fit a place of its own"
            )
        self.step, self.best_step, self.stale = (int(value) for value in state["counters"])
        self.best, self.mark = (float(value) for value in state["marks"])
        self.elapsed_s = float(state["elapsed_s"])
        self.losses = [(int(step), float(trained), float(judged)) for step, trained, judged in state["losses"]]
        self.turn_losses = np.asarray(state["turn_losses"]).tolist()
        self.loss_sums.copy_(torch.as_tensor(state["loss_sums"]))
        self.generator.set_state(torch.as_tensor(state["random/draw"]))
        torch.set_rng_state(torch.as_tensor(state["random/cpu"]))
        if self.device.type == "cuda" and "random/cuda" in state:
            torch.cuda.set_rng_state(torch.as_tensor(state["random/cuda"]), self.device)
        for index, (turn, optimiser) in enumerate(zip(self.turns, self.optimisers, strict=True)):
            turn.module.load_state_dict(_tensors(state, f"module/{index}"))
            _load_optimiser(optimiser, state, f"optimiser/{index}")
        best = [_tensors(state, f"best/{index}") for index in range(len(self.turns))]
        self.best_weights = best if any(best) else []

    def _identity(self) -> str:
        """The description that a checkpoint must agree with; without the limit of time and the times of checkpoints."""
        free = ("checkpoint_every_s", "max_minutes")
        plan = {name: value for name, value in asdict(self.plan).items() if name not in free}
        turns = [
            {
                "name": turn.name,
                "parameters": sum(p.numel() for p in turn.module.parameters()),
                "every": turn.every,
                "plan": turn.plan and {name: value for name, value in asdict(turn.plan).items() if name not in free},
            }
            for turn in self.turns
        ]
        return json.dumps({"what": self.what, "seed": self.runtime.seed, "turns": turns, **plan}, sort_keys=True)

    def _judge(self) -> float:
        if self.validate is None:
            return math.nan
        self._mode(train=False)
        with torch.no_grad(), self._precision():
            judged = float(self.validate())
        self._mode(train=True)
        return judged

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.runtime.mixed_precision)

    def _mode(self, *, train: bool) -> None:
        for turn in self.turns:
            turn.module.train(train)


def _optimiser(module: nn.Module, plan: TrainPlan) -> torch.optim.Optimizer:
    learned = [p for p in module.parameters() if p.requires_grad]
    # Fused: one pass over the weights; a step of many small ones takes a fifth of the time. torch fuses no rmsprop.
    extra: dict[str, Any] = {"betas": plan.betas, "eps": plan.eps, "fused": True}
    if plan.optimiser == "sgd":
        extra = {"momentum": plan.momentum, "fused": True}
    if plan.optimiser == "rmsprop":
        extra = {"alpha": plan.betas[1], "eps": plan.eps}
    return OPTIMISERS[plan.optimiser](learned, lr=plan.learning_rate, weight_decay=plan.weight_decay, **extra)


def _load_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, np.ndarray], prefix: str) -> None:
    for number, parameter in enumerate(optimiser.param_groups[0]["params"]):
        for name, value in _tensors(state, f"{prefix}/{number}").items():
            if value.shape == parameter.shape and name != "step":
                # Same device and memory order as the parameter, or the next step would round in another order.
                value = torch.empty_like(parameter).copy_(value)
            optimiser.state[parameter][name] = value


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _clone(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _array(value: torch.Tensor) -> np.ndarray:
    # A copy, because training goes on while it is being written; in C order, as file formats expect.
    return np.array(value.detach().cpu().numpy(), order="C")


def _arrays(prefix: str, state: Mapping[str, torch.Tensor | None]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": _array(value) for name, value in state.items() if value is not None}


def _tensors(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    start = len(prefix) + 1
    return {k[start:]: torch.from_numpy(np.array(v)) for k, v in state.items() if k.startswith(prefix + "/")}
