"""What tests of nights share: a plant whose nights can be run, and a webhook that its alarms are posted to."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flows.nightly import NightOutcome, nightly
from flows.runs.runfile import DataSource, MethodRun, NightlyRun
from flows.where.runners import runner_for
from storage.models import Registry
from storage.nights import Decision, read_decisions
from storage.samples import content_hash
from storage.store import Store
from tasks.demo_data import make_demo_data

NAME = "mvtec_ad/brick"


class Plant:
    """A place where new good images arrive every day, and whose nights can be run."""

    def __init__(
        self, root: Path, labelled: bool = True, later: int = 6, first: int = 18, validation: int = 8, smuggled: int = 0
    ) -> None:
        """`first` good images and those of validation and test are there; `later` more are to come, and so many
        `smuggled` ones with a foreign patch, as if something lay on the part."""
        self.root, self.data = root, root / "data"
        train = first + later + smuggled
        make_demo_data(root / "all", train=train, validation=validation, good=6, defects_per_type=2, size=64)
        shutil.copytree(root / "all" / "brick", self.data / "brick")
        if not labelled:
            shutil.rmtree(self.data / "brick" / "test")
        self.good = self.data / "brick" / "train" / "good"
        for folder in ("later", "defective"):
            (root / folder).mkdir()
        paths = sorted(self.good.iterdir())
        for path in paths[first : first + later]:
            shutil.move(path, root / "later")
        for number, path in enumerate(paths[first + later :]):
            _with_patch(path, root / "all" / "grass" / "train" / "good" / path.name, number)
            shutil.move(path, root / "defective")
        self.store = Store(str(root / "store"))
        self.registry = Registry(self.store)

    def deliver(self, images: int) -> None:
        """So many new good images."""
        for path in sorted((self.root / "later").iterdir())[:images]:
            shutil.move(path, self.good)

    def smuggle(self) -> set[str]:
        """The images with a patch are delivered as good; their names."""
        names = {path.name for path in (self.root / "defective").iterdir()}
        for name in names:
            shutil.move(self.root / "defective" / name, self.good / name)
        return names

    def content(self, path: Path) -> str:
        """An image's content name."""
        return content_hash(path.read_bytes())

    def run(self, **changes: Any) -> NightlyRun:
        """What a night is to do."""
        source = DataSource(dataset="mvtec_ad", root=str(self.data), categories=["brick"])
        method = MethodRun(name="padim", params={"image_size": 64, "channels": 10})
        places = {"store": self.store.url, "report": str(self.root / "report")}
        return NightlyRun(
            **{"data": [source], "method": method, "workers": 1, "false_reject_rate": 0.2, **places, **changes}
        )

    def night(self, **changes: Any) -> Decision:
        """One night."""
        (decision,) = self.outcome(**changes).decisions
        assert decision in list(read_decisions(self.store, NAME))
        return decision

    def outcome(self, **changes: Any) -> NightOutcome:
        """What the flow gives."""
        run = self.run(**changes)
        state = nightly.with_options(task_runner=runner_for(run))(run, return_state=True)
        outcome = state.result(raise_on_failure=False)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    @property
    def aliases(self) -> dict[str, int]:
        """Which version is what."""
        return self.registry.aliases(NAME).points


def _with_patch(path: Path, foreign: Path, seed: int) -> None:
    """Paste a piece of another texture into an image."""
    image, other = (np.asarray(Image.open(one).convert("L")).copy() for one in (path, foreign))
    rng = np.random.default_rng(seed)
    side = int(rng.integers(16, 29))
    y, x = rng.integers(0, 64 - side, 2)
    image[y : y + side, x : x + side] = other[:side, :side]
    Image.fromarray(image).save(path)


@contextmanager
def listening() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address, and what was posted to it so far."""
    posted: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/alarm", posted
    server.shutdown()
    thread.join()
    server.server_close()
