"""What a search tries: a method, its parameters and their values, and how the choice is made (`[search]`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from al_models.errors import InvalidInput, unknown
from al_models.registry import METHODS, create
from tasks.search.trials import Interval, Rung, Space, Trial, distinct, draws, grid, ladder


def in_words(params: Mapping[str, Any]) -> str:
    """Parameters and their values, for people."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())


class Strict(BaseModel):
    """An unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class MethodRun(Strict):
    """A method and the parameters that differ from its paper's."""

    name: str = Field(description="Name of the method: see `al methods`", json_schema_extra={"enum": list(METHODS)})
    params: dict[str, Any] = Field(
        default_factory=dict,
        description='What differs from the paper, as {"image_size": 384}; `al methods show NAME` lists all',
    )


class Range(Strict):
    """Numbers to draw from, both ends included; whole numbers where both ends are."""

    low: int | float = Field(description="The smallest")
    high: int | float = Field(description="The largest")
    log: bool = Field(False, description="Whether each order of magnitude is as likely as any other")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} and high={self.high} were given; high must be above low")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} was given with log=true; give one above 0, or leave log out")
        return self


_Values = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("range")],
    Discriminator(lambda given: "list" if isinstance(given, list) else "range"),  # else one mistake is told as two
]


class SearchRun(Strict):
    """Parameters of one method, chosen by synthetic defects in held-out good training images."""

    method: str = Field(description="Name of the method: see `al methods`", json_schema_extra={"enum": list(METHODS)})
    params: dict[str, _Values] = Field(
        min_length=1, description="Parameter -> a list of values, or {low, high, log} to draw from"
    )
    fixed: dict[str, Any] = Field(default_factory=dict, description="Parameters that all trials share")
    strategy: Literal["grid", "random"] = Field("grid", description="All combinations, or some drawn at random")
    trials: int | None = Field(None, ge=1, description="How many to draw, for `random`")
    seed: int = Field(0, ge=0, description="Of the draws and of what is held out")
    metric: str = Field("pro", description="What is to be high: a metric of a record")
    eta: int = Field(3, ge=2, description="One of so many trials goes on to the next rung, with so much more resource")
    resource: str = Field("images", description="images (a share of those to learn from), or a parameter as `epochs`")
    held_out: float = Field(0.25, gt=0, lt=1, description="Share of the good training images to choose by")

    @field_validator("params", mode="before")
    @classmethod
    def _lists_or_ranges(cls, params: Any) -> Any:
        for name, values in params.items() if isinstance(params, dict) else ():
            if not isinstance(values, list | dict | Range) or values == []:
                expected = 'a list of values such as [1, 2], or {low = 1, high = 9} with strategy = "random"'
                raise ValueError(f"{name} = {values!r} was given; expected is {expected}")
        return params

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        both = sorted({*self.params} & {*self.fixed})
        if both:
            raise ValueError(f"{', '.join(both)} stands in params and in fixed; leave it out of one of them")
        ranges = [name for name, values in self.params.items() if isinstance(values, Range)]
        if self.strategy == "grid" and ranges:
            raise ValueError(f'a grid has no ranges, but {ranges[0]} is one; give a list, or strategy = "random"')
        if (self.strategy == "random") != (self.trials is not None):
            fix = "say how many with trials = 9" if self.trials is None else 'leave it out, or say strategy = "random"'
            raise ValueError(f'trials is for strategy = "random", and needed there; {fix}')
        if self.resource in self.params:
            raise ValueError(f"{self.resource} is the resource, so it is not searched; put its full value into fixed")
        return self

    def all_trials(self) -> list[Trial]:
        """What is tried, each once. Raises UnknownName for a parameter that the method does not have."""
        space: Space = {
            name: Interval(values.low, values.high, values.log) if isinstance(values, Range) else values
            for name, values in self.params.items()
        }
        found = grid(space) if self.strategy == "grid" else draws(space, self.seed)

        def name(params: dict[str, Any]) -> str:
            return json.dumps(create(self.method, **self.fixed, **params).params(), sort_keys=True)

        kept = distinct(found, name, self.trials)
        return [Trial(number, self.method, {**self.fixed, **params}) for number, params in enumerate(kept)]

    def searched(self, trial: Trial) -> dict[str, Any]:
        """A trial's values of what is searched, without those that all share."""
        return {name: trial.params[name] for name in self.params}

    def ladder(self) -> list[Rung]:
        """Its rungs."""
        return ladder(len(self.all_trials()), self.eta)

    def image_share(self, rung: Rung) -> float:
        """Share of the images to learn from, in a rung."""
        return rung.share if self.resource == "images" else 1.0

    def at(self, trial: Trial, rung: Rung) -> MethodRun:
        """What a rung runs of a trial."""
        part: dict[str, int | float] = {}
        if self.resource != "images" and rung.share < 1:
            whole = self._whole_resource()
            value = whole * rung.share
            part = {self.resource: max(1, round(value)) if isinstance(whole, int) else value}
        return MethodRun(name=trial.method, params={**trial.params, **part})

    def check(self) -> None:
        """Raises UnknownName or InvalidInput for a method, parameter, metric or resource that cannot be."""
        from tasks.compare.tables import METRICS

        self.all_trials()
        known = [name for name in METRICS if not name.startswith(("spro_", "fpr_"))]  # absent here, or better when low
        if self.metric not in known:
            raise unknown("metric of a search", self.metric, known)
        if self.resource != "images":
            self._whole_resource()

    def _whole_resource(self) -> int | float:
        params = create(self.method, **self.fixed).params()
        numbers = [name for name, value in params.items() if type(value) in (int, float)]
        if self.resource not in params:
            raise unknown(f"resource of {self.method}", self.resource, ["images", *numbers])
        whole = params[self.resource]
        if type(whole) not in (int, float) or whole <= 0:
            raise InvalidInput(
                f"the resource {self.resource} of {self.method} is {whole!r}; expected is a number above 0, which it "
                f"has in the last rung: put it into fixed, or take one of {', '.join(['images', *numbers])}"
            )
        return whole
