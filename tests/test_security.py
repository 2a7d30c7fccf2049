"""What comes from outside is checked, what is secret stays so, and nobody outside of this machine is let in.

Others of the kind stand with what they are about:

- archives (`..`, links, devices, bombs, sizes): test_download.py
- paths and links in data sets and their lists: test_bad_input.py, test_datasets.py, test_dataset_*.py
- images and masks that are bombs, or cut short: test_images.py, test_masks.py, test_polygons.py, test_predict_images.py
- keys that leave a store: test_store.py; names of models: test_models.py; changed bytes of a version: test_register.py
- names that would break out of a page: test_report.py, test_report_data.py
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import SECRET, Command, ask
from jsonschema import ValidationError, validate
from PIL import Image

from al_models.errors import InvalidInput
from al_models.registry import create
from flows.benchmark import benchmark
from flows.ingest import ingest as ingest_flow
from flows.nightly import nightly
from flows.predict import predict
from flows.report import report as report_flow
from flows.runs.runfile import DataSource, MethodRun, RunFile, RunFileError, read_run_file
from flows.search import search
from flows.where import server
from flows.where.cluster import LocalCluster
from storage import files
from storage.datasets import list_samples
from storage.errors import HoldsPassword, NotInStore
from storage.models import Registry
from storage.nights import Decision, write_decision
from storage.records import RunRecord, write_record
from storage.stacks import Stack
from storage.store import Store
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.report.benchmark.report import render
from tasks.report.nights.report import nights_report

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "tasks", "al_models", "storage")
WITH_PASSWORD = f"ftp://anna:{SECRET}@files.example/store"


# the store's root is the only place that is read and written


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("link", ["features", "features/one.bin"])
def test_a_link_does_not_lead_out_of_a_store(store: Store, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "one.bin").write_bytes(b"mine")
    place = Path(store.url) / link
    place.parent.mkdir(parents=True)
    place.symlink_to(outside if link == "features" else outside / "one.bin")
    actions: list[Callable[[str], Any]] = [
        store.read_bytes, store.delete, store.zarr_store, lambda key: store.write_bytes(key, b"theirs"),
    ]  # fmt: skip
    for action in actions:
        with pytest.raises(NotInStore, match=r"leads out of .* by a link"):
            action("features/one.bin")
    assert (outside / "one.bin").read_bytes() == b"mine"


def test_a_store_may_be_a_link_and_hold_links_to_itself(store: Store, tmp_path: Path) -> None:
    store.write_bytes("a/one", b"1")
    (Path(store.url) / "b").symlink_to(Path(store.url) / "a")
    (tmp_path / "also").symlink_to(store.url)
    assert Store(str(tmp_path / "also")).read_bytes("b/one") == b"1"


OUT = ["../outside", "/etc", "a/../../outside"]


@pytest.fixture
def outside(tmp_path: Path) -> None:
    """Beside the store, an output that could be read if a name led there."""
    bait = Store(str(tmp_path / "outside"))
    bait.create_array("maps", (1, 2), "float32", chunk=1)
    bait.write_bytes("scores.parquet", b"mine")
    bait.write_json("manifest.json", {"folder": "x", "meta": {}})


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("folder", OUT)
def test_a_manifest_leads_nowhere_else(store: Store, folder: str) -> None:
    store.write_json("maps/one/manifest.json", {"folder": folder, "meta": {"parts": [[folder, 1]]}})
    found = store.get("maps/one")
    with pytest.raises(NotInStore, match="is not a key"):
        store.read_bytes(f"{found.folder}/scores.parquet")
    with pytest.raises(NotInStore):
        Stack.open(store, found, "maps")


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("name", OUT)
def test_no_name_in_a_record_leads_out(store: Store, name: str) -> None:
    record = RunRecord(cell="c", dataset="d", category="c", method="padim", seed=0, params={}, status="done")
    for changed in ({"dataset": name}, {"category": name}, {"cell": name}):
        with pytest.raises(NotInStore, match="is not a key"):
            write_record(store, RunRecord(**{**vars(record), **changed}))
    with pytest.raises(NotInStore, match="is not a key"):
        write_decision(store, Decision(name, "c", "2026-01-01T02:00:00", "kept", "because"))
    with pytest.raises(NotInStore):
        Registry(store).resolve(name)
    with pytest.raises(NotInStore):
        store.get(name)


# images and model files from outside


def test_a_bomb_costs_a_data_set_no_more_than_itself(demo_root: Path, tmp_path: Path) -> None:
    good = tmp_path / "data" / "part" / "train" / "good"
    good.mkdir(parents=True)
    for image in sorted((demo_root / "brick" / "train" / "good").iterdir()):
        (good / image.name).write_bytes(image.read_bytes())
    Image.new("1", (10_000, 10_000)).save(good / "bomb.png")
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tmp_path / "data"), None, {}).categories
    prepared = prepare.fn(category, 32)
    import pandas as pd

    found = Store(category.store).get(prepared.images)
    facts = pd.read_parquet(Store(category.store).path(f"{found.folder}/facts.parquet")).set_index("path")
    assert "too large" in facts.loc["part/train/good/bomb.png", "problem"]
    assert list(facts["readable"]).count(False) == 1


def test_a_file_too_large_for_the_memory_is_not_read(demo_root: Path, tmp_path: Path) -> None:
    good = tmp_path / "part" / "train" / "good"
    good.mkdir(parents=True)
    (good / "a.png").write_bytes(next((demo_root / "brick" / "train" / "good").iterdir()).read_bytes())
    with (good / "huge.png").open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    listing = list_samples("mvtec_ad", tmp_path)
    assert [sample.path for sample in listing.samples] == ["part/train/good/a.png"]
    assert [(one.path, "larger than 1 GiB" in one.reason) for one in listing.set_aside] == [
        ("part/train/good/huge.png", True)
    ]


class _Runs:
    """Unpickled, it would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.place),)


def test_weights_that_hold_code_are_refused_and_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"conv_stem.weight": _Runs(tmp_path / "ran")}, tmp_path / "evil.pth")
    detector = create("padim", image_size=32, weights=str(tmp_path / "evil.pth"))
    import numpy as np

    with pytest.raises(InvalidInput, match=r"evil\.pth holds no state dict"):
        detector.fit(np.zeros((2, 32, 32, 3), np.uint8))
    assert not (tmp_path / "ran").exists()


def calls_and_imports() -> Iterator[tuple[str, str, ast.Call | None]]:
    """(file, name as it is written, the call) of each call and import in our packages."""
    for file in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        where = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield where, ast.unparse(node.func), node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                yield from ((where, f"import {name}", None) for name in names)


def test_nothing_stored_can_hold_code() -> None:
    pickles = re.compile(r"import (pickle|marshal|shelve|dill|joblib|cloudpickle)|eval|exec|os\.system|yaml\.load")
    found = list(calls_and_imports())
    # A detector has to survive the way to a Dask worker, which is what this check is about.
    assert [(file, name) for file, name, _ in found if pickles.fullmatch(name)] == [
        ("al_models/checks/learning.py", "import pickle")
    ]
    loads = [(file, call) for file, name, call in found if name == "torch.load" and call is not None]
    assert [file for file, call in loads if "weights_only=True" not in ast.unparse(call)] == []
    given = [ast.unparse(call) for _, _, call in found if call is not None]
    assert [text for text in given if re.search(r"\b(allow_pickle|shell)=True|weights_only=False", text)] == []


# secrets


def test_a_store_holds_no_password(tmp_path: Path) -> None:
    with pytest.raises(HoldsPassword, match="by the environment") as caught:
        Store(WITH_PASSWORD)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(Store("s3://bucket/store", {"key": "anna", "secret": SECRET}))
    assert Store("s3://bucket/with:colon@sign").url == "s3://bucket/with:colon@sign"
    (tmp_path / "run.toml").write_text(f'store = "{WITH_PASSWORD}"\n[[data]]\ndataset = "demo"\nroot = "x"\n')
    with pytest.raises(RunFileError, match="holds a password") as refused:
        read_run_file(tmp_path / "run.toml")
    assert SECRET not in str(refused.value)


def test_the_command_refuses_a_password_without_repeating_it(al: Command) -> None:
    for arguments in (["records"], ["report"], ["benchmark", "--data", "demo=x"], ["predict", "x", "--model", "a/b"]):
        code, out, err = al(*arguments, "--store", WITH_PASSWORD)
        assert (code, SECRET in out + err) == (2, False)
        assert "holds a password" in err


@pytest.mark.parametrize("flow", [benchmark, search, ingest_flow, nightly, predict, report_flow], ids=lambda f: f.name)
def test_the_prefect_server_refuses_a_password_before_it_keeps_the_parameters(flow: Any) -> None:
    schema = flow.parameters.model_dump()
    run = {"data": [{"dataset": "demo", "root": "x"}], "model": "a/b", "images": ["x"]}
    known = schema["definitions"][schema["properties"]["run"]["$ref"].rsplit("/", 1)[-1]]["properties"]
    given = {name: value for name, value in run.items() if name in known}
    validate({"run": {**given, "store": "s3://bucket/store"}}, schema)
    with pytest.raises(ValidationError):
        validate({"run": {**given, "store": WITH_PASSWORD}}, schema)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_credentials_are_written_nowhere(bucket: str, api: str, demo_root: Path, tmp_path: Path) -> None:
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    run = RunFile(
        data=[DataSource(dataset="mvtec_ad", root=str(demo_root), categories=["brick"])],
        methods=[MethodRun(name="padim", params={"image_size": 64, "channels": 10})],
        store=f"{bucket}/store",
        report=str(tmp_path / "report"),
    )
    state = benchmark(run, return_state=True)
    assert state.is_completed(), state.message
    store = Store(run.store)
    kept = {key: store.read_bytes(key) for key in store.list("")}
    kept |= {str(path): path.read_bytes() for path in (tmp_path / "report").rglob("*") if path.is_file()}
    assert {"index.html", "results.csv"} <= {Path(name).name for name in kept}
    assert [name for name, data in kept.items() if SECRET.encode() in data] == []
    told = [json.dumps(ask(api, f"{what}/filter", {})) for what in ("logs", "artifacts", "flow_runs", "task_runs")]
    assert all(len(answer) > 2 for answer in told)
    assert not any(SECRET in answer for answer in told)


def test_the_address_of_a_webhook_is_kept_as_a_secret(api: str) -> None:
    from flows.alerts import tell

    tell(f"https://hooks.example/{SECRET}")
    told = json.dumps([ask(api, "block_documents/filter", {}), ask(api, "automations/filter", {})])
    assert "al-alarms" in told
    assert SECRET not in told


# who is let in


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses at which they listen."""
    found = [connection for process in processes for connection in process.net_connections("inet")]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def test_the_local_server_listens_to_this_machine_alone(api: str) -> None:
    keeper = psutil.Process(json.loads((server.home() / "server.json").read_text())["keeper"])
    assert listening([keeper, *keeper.children(recursive=True)]) == {"127.0.0.1"}


def test_the_local_cluster_listens_to_this_machine_alone() -> None:
    this = psutil.Process()
    before = {connection.laddr for connection in this.net_connections("inet")}
    with LocalCluster(processes=1, gpus=0):
        own = {c.laddr for c in this.net_connections("inet") if c.status == psutil.CONN_LISTEN} - before
        workers = [child for child in this.children(recursive=True) if listening([child])]
        assert workers
        assert {place.ip for place in own} | listening(workers) == {"127.0.0.1"}


# pages


EVIL = "\"><img src=x onerror=alert(1)>'<script>alert(2)<!--"


class Tags(HTMLParser):
    """The tags of a page, and what its elements do by themselves."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.acts: set[str] = set()
        self.allowed = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.acts |= {name for name, _ in attrs if name.startswith("on")}
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.allowed = dict(attrs)["content"] or ""


def test_no_name_breaks_out_of_the_pages(store: Store, tmp_path: Path) -> None:
    record = RunRecord(
        cell="c", dataset=EVIL, category=EVIL, method=EVIL, seed=0, params={EVIL: EVIL}, status="failed", reason=EVIL
    )
    write_decision(store, Decision(EVIL, EVIL, "2026-01-01T02:00:00", "kept", EVIL))
    night = Path(nights_report(store.url, str(tmp_path))).read_text(encoding="utf-8")
    for page in (render(store, [record]), night):
        found, scripts = Tags(page), re.findall("<script>(.*?)</script>", page, re.DOTALL)
        assert EVIL not in page
        assert not {"iframe", "object", "form"} & found.seen
        assert found.acts == set()
        assert "onerror=alert" in page, "it is shown, as text"
        # And were it not, the browser would load nothing, and run what the page is known to hold alone.
        assert "default-src 'none'" in found.allowed
        assert page.count("<script") == len(scripts)
        assert [base64.b64encode(sha256(text.encode()).digest()).decode() in found.allowed for text in scripts] == [
            True for _ in scripts
        ]
