"""Deployment files name what exists: run files run, entrypoints import, commands parse, parts find each other."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import prefect.server.api as prefect_server
import pytest
import typer.main
import yaml
from conftest import answers, eventually, free_port, stop
from jsonschema import validate
from packaging.requirements import Requirement
from PIL import Image
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from al_models.registry import METHODS
from flows.cli import app
from flows.demo import demo_run
from flows.runs.runfile import Run, RunFile, read_run_file
from flows.serve import POOL, deployments
from flows.where import server
from storage.store import Store

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
IN_IMAGE = "/opt/anomaly-localization/"
"""Where the image keeps the checkout's `infra`."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PREFECT_YAML = yaml.safe_load((INFRA / "prefect.yaml").read_text())
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MANIFESTS = [
    manifest
    for file in sorted((INFRA / "kubernetes").rglob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]
YAML_RULES = {
    "line-length": {"max": 120},
    "document-start": "disable",
    "comments": {"min-spaces-from-content": 1},
}
ON_KUBERNETES_ALONE = {"job-worker", "deploy-jobs"}
POOLS = {file.stem: json.loads(file.read_text()) for file in sorted((INFRA / "pools").glob("*.json"))}
"""Type of a work pool -> the template of its jobs."""


def named(kind: str) -> dict[str, dict[str, Any]]:
    """The Kubernetes objects of a kind."""
    return {manifest["metadata"]["name"]: manifest for manifest in MANIFESTS if manifest["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    return {name: one["spec"]["template"]["spec"] for name, one in (named("Deployment") | named("Job")).items()}


def containers() -> dict[str, dict[str, Any]]:
    found = [c for pod in pods().values() for c in pod.get("initContainers", []) + pod["containers"]]
    return {container["name"]: container for container in found}


def programs(command: list[str]) -> list[list[str]]:
    """What a container's command starts: itself, or each part of a shell's `a && b`."""
    if command[:2] == ["sh", "-c"]:
        return [shlex.split(part) for part in command[2].split("&&")]
    return [command]


OURS = {name: service["command"] for name, service in SERVICES.items() if service["image"] == PROJECT["name"]}
PROGRAMS = [program for command in OURS.values() for program in programs(command)]


# run files


def run_files() -> list[Path]:
    return sorted((INFRA / "runs").glob("*.toml"))


@pytest.mark.parametrize("file", run_files(), ids=lambda file: file.stem)
def test_a_run_file_names_what_exists(file: Path) -> None:
    run = read_run_file(file).check()
    assert not Path(run.store).is_absolute()
    assert not Path(run.report).is_absolute()


def test_the_smoke_run_is_small_and_uses_the_images_of_the_demo() -> None:
    smoke = read_run_file(INFRA / "runs" / "smoke.toml")
    demo = demo_run(store=smoke.store, report="al-demo/report")
    assert [(method.name, method.params["image_size"]) for method in smoke.methods] == [
        ("padim", 128),
        ("patchcore", 128),
    ]
    assert (smoke.data[0].dataset, smoke.data[0].root) == (demo.data[0].dataset, demo.data[0].root)
    assert smoke.data[0].categories == ["brick"]
    assert smoke.report != demo.report


def test_the_survey_run_leaves_nothing_out() -> None:
    run = read_run_file(INFRA / "runs" / "mvtec_ad.toml")
    assert [method.name for method in run.asked_methods()] == list(METHODS)
    assert [(source.dataset, source.categories) for source in run.data] == [("mvtec_ad", None)]
    assert len(set(run.seeds)) == 3


# deployments


@pytest.mark.parametrize("deployment", PREFECT_YAML["deployments"], ids=lambda deployment: deployment["entrypoint"])
def test_a_deployment_is_a_flow_with_parameters_it_takes(deployment: dict[str, Any]) -> None:
    entrypoint = deployment["entrypoint"]
    assert ":" not in entrypoint, "a module's: Prefect puts the folder of a file first on the path"
    flow = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    assert isinstance(flow, Flow)
    assert list(deployment["parameters"]) == list(flow.parameters.properties) == ["run"]
    run = get_type_hints(flow.fn)["run"].model_validate(deployment["parameters"]["run"])
    if isinstance(run, Run):  # the others ask a store, which is not there
        run.check()  # type: ignore[attr-defined]
    assert deployment["work_pool"]["name"] == POOL


def test_al_serve_offers_the_same_deployments() -> None:
    def told(name: str, entrypoint: str, tags: list[str], description: str) -> tuple[str, ...]:
        return name, entrypoint, *tags, description

    served = [told(d.name, d.entrypoint or "", d.tags, d.description or "") for d in deployments(ROOT)]
    shared = [told(d["name"], d["entrypoint"], d["tags"], d["description"]) for d in PREFECT_YAML["deployments"]]
    assert served == shared
    assert [d.flow_name for d in deployments(ROOT)] == ["benchmark", "search", "ingest", "nightly", "predict", "report"]


@pytest.mark.parametrize("entrypoint", [d["entrypoint"] for d in PREFECT_YAML["deployments"]])
def test_the_form_of_a_deployment_explains_each_field(entrypoint: str) -> None:
    flow = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    assert isinstance(flow, Flow)
    assert flow.description
    forms = flow.parameters.model_dump()["definitions"]
    assert [
        f"{form}.{name}"
        for form, schema in forms.items()
        for name, field in schema.get("properties", {}).items()
        if not field.get("description")
    ] == []


def test_the_local_deployment_is_the_one_of_al_serve() -> None:
    local = next(found for found in PREFECT_YAML["deployments"] if found["name"] == "local")
    given = RunFile.model_validate(local["parameters"]["run"])
    assert given.model_dump() == demo_run(store="al-demo/store", report="al-demo/report").model_dump()


def test_the_nightly_example_is_off_and_turns_no_night_of_other_models_away() -> None:
    nightly = next(found for found in PREFECT_YAML["deployments"] if "nightly.nightly" in found["entrypoint"])
    assert nightly["schedules"] == [{"cron": "0 2 * * *", "timezone": "UTC", "active": False}]
    assert "concurrency_limit" not in nightly, "of one model there is one night at once: tests/test_nightly.py"


# the parts: compose and Kubernetes


def test_every_part_of_ours_is_there() -> None:
    usual = {"server", "deploy", "worker", "scheduler", "dask-worker"}
    assert set(OURS) == usual | {"gpu-worker", "bucket", "smoke"}
    assert {name for name in SERVICES if not SERVICES[name].get("profiles")} == usual | {"database"}
    assert {program[0] for program in PROGRAMS} == {"al", "dask", "prefect", "python"}


def test_both_start_the_same_parts_alike() -> None:
    alike = set(containers()) - ON_KUBERNETES_ALONE
    assert alike == set(SERVICES) - {"smoke"}
    for name in alike - {"objects"}:
        container = containers()[name]
        assert container["image"] == SERVICES[name]["image"]
        assert container.get("command") == SERVICES[name].get("command"), name


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p[0] == "dask"], ids=" ".join)
def test_a_dask_command_takes_its_options(program: list[str]) -> None:
    (found,) = entry_points(group="dask_cli", name=program[1])
    context = found.load().make_context(program[1], program[2:])
    asked = {word: after for word, after in pairwise(program) if word.startswith("--")}
    assert asked
    assert {option: str(context.params[option.removeprefix("--")]) for option in asked} == asked


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p[0] == "al"], ids=" ".join)
def test_an_al_command_takes_its_options(program: list[str]) -> None:
    assert "al" in PROJECT["scripts"]
    command = typer.main.get_command(app).commands[program[1]]  # type: ignore[attr-defined]
    assert command.make_context(program[1], program[2:]).params["runner"] == "tcp://scheduler:8786"


def test_the_bucket_is_made_once_and_holds_a_store(bucket: str) -> None:
    (program,) = [p for p in PROGRAMS if p[0] == "python"]
    for _ in range(2):  # as when the parts are started again
        subprocess.run([sys.executable, *program[1:]], env=os.environ, check=True, timeout=60)
    (url,) = re.findall(r"s3://\w+/\w+", (INFRA / "compose.yaml").read_text())
    Store(url).check_format()
    assert Store(url).list("") == ["store.json"]


def test_compose_refers_to_what_it_defines() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", ())) <= set(SERVICES), name
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(COMPOSE["volumes"]), name
    shared = {name for name, service in SERVICES.items() if "al:/data" in service.get("volumes", ())}
    assert shared >= {"worker", "dask-worker", "smoke"}


def test_kubernetes_refers_to_what_it_defines() -> None:
    claims, configs = named("PersistentVolumeClaim"), named("ConfigMap")
    for name, pod in pods().items():
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod.get("volumes", ())}
        assert set(volumes.values()) <= set(claims), name
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["enableServiceLinks"] is False, "a service's PREFECT_* or DASK_* variables are read as settings"
        for container in pod.get("initContainers", []) + pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= set(volumes), name
            sources = [source for source in container.get("envFrom", ()) if "configMapRef" in source]
            assert {source["configMapRef"]["name"] for source in sources} <= set(configs), name
    for name, service in named("Service").items():
        ports = [port["containerPort"] for c in pods()[name]["containers"] for port in c.get("ports", ())]
        assert service["spec"]["selector"] == {"app": name}
        assert [port["port"] for port in service["spec"]["ports"]] == ports


@pytest.mark.parametrize("part", [COMPOSE, MANIFESTS], ids=["compose", "kubernetes"])
def test_addresses_lead_to_parts(part: object) -> None:
    found = set(re.findall(r"(?:://|@)([a-z-]+:\d+)", json.dumps(part)))
    assert found - {"localhost:4200"} == {"server:4200", "database:5432", "scheduler:8786"}
    assert set(named("Service")) == {"server", "database", "scheduler", "objects"}
    assert set(named("Service")) <= set(SERVICES)


# work pools, and what the official schemas and linters say; each brings them along and asks nothing of the network


def official(kind: str) -> dict[str, Any]:
    """Prefect's own template of the jobs of such a pool."""
    views = Path(prefect_server.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"
    workers = json.loads(views.read_text())[f"prefect-{kind}"]
    template: dict[str, Any] = workers[kind]["default_base_job_configuration"]
    return template


def filled(part: Any, values: dict[str, Any]) -> Any:
    """The part with values for what stands in braces; what has none is left out, as Prefect does."""
    if isinstance(part, dict):
        found = {key: filled(value, values) for key, value in part.items()}
        return {key: value for key, value in found.items() if value is not None}
    if isinstance(part, list):
        return [filled(value, values) for value in part]
    name = re.fullmatch(r"\{\{ (\w+) \}\}", part) if isinstance(part, str) else None
    if name:
        return values.get(name[1])
    return re.sub(r"\{\{ (\w+) \}\}", lambda one: str(values[one[1]]), part) if isinstance(part, str) else part


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_asks_for_what_prefect_knows(kind: str) -> None:
    ours, prefects = POOLS[kind], official(kind)
    assert set(ours["job_configuration"]) <= set(prefects["job_configuration"])
    variables = ours["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert used == set(variables)
    defaults = {name: variable["default"] for name, variable in variables.items() if "default" in variable}
    validate(defaults, ours["variables"])
    validate({name: value for name, value in defaults.items() if name not in ("cpu", "memory")}, prefects["variables"])
    assert all(variable["description"] for variable in variables.values())


def test_a_container_of_a_run_is_beside_those_of_compose() -> None:
    defaults = {name: one.get("default") for name, one in POOLS["docker"]["variables"]["properties"].items()}
    assert defaults["image"] == SERVICES["worker"]["image"]
    assert defaults["env"] == SERVICES["worker"]["environment"]
    assert defaults["volumes"] == [f"{COMPOSE['name']}_{volume}" for volume in SERVICES["worker"]["volumes"]]
    assert defaults["networks"] == [f"{COMPOSE['name']}_default"]


def test_kubernetes_takes_the_manifests_and_the_job_of_a_run() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    template = POOLS["kubernetes"]
    values = {name: one.get("default") for name, one in template["variables"]["properties"].items()}
    job = filled(template["job_configuration"]["job_manifest"], values | {"name": "a-run"})
    pod = job["spec"]["template"]["spec"]
    # Prefect wants them here, where Kubernetes knows them not; the server drops what it does not know.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    worker = pods()["worker"]
    assert {**pod, "containers": None} == {**pod, "containers": None} | {
        key: worker[key] for key in ("volumes", "securityContext", "enableServiceLinks")
    }
    (container,) = pod["containers"]
    assert [container[key] for key in ("volumeMounts", "envFrom")] == [
        worker["containers"][0][key] for key in ("volumeMounts", "envFrom")
    ]
    for manifest in [*MANIFESTS, job]:
        kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_compose_keeps_to_its_specification() -> None:
    schemas = files(pytest.importorskip("check_jsonschema")) / "builtin_schemas" / "vendor"
    validate(COMPOSE, json.loads((schemas / "compose-spec.json").read_text()))


def test_nothing_in_infra_is_untidy() -> None:
    config, linter = pytest.importorskip("yamllint.config"), pytest.importorskip("yamllint.linter")
    rules = config.YamlLintConfig(json.dumps({"extends": "default", "rules": YAML_RULES}))
    found = {
        str(file.relative_to(INFRA)): [str(problem) for problem in linter.run(file.read_text(), rules)]
        for file in sorted(INFRA.rglob("*.yaml"))
    }
    assert {file: problems for file, problems in found.items() if problems} == {}


def test_the_dockerfile_is_as_its_linter_wants_it() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [hadolint, "--no-color", str(INFRA / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


# the image


def dockerfile() -> str:
    return (INFRA / "Dockerfile").read_text().replace("\\\n", " ")


def test_the_settings_of_the_image_are_those_of_the_command_line() -> None:
    (line,) = re.findall(r"^ENV (.*)$", dockerfile(), re.MULTILINE)
    settings = dict(pair.split("=", 1) for pair in shlex.split(line))
    assert settings.pop("PYTHONUNBUFFERED") == "1"
    assert settings == {name: server.QUIET[name] for name in settings}
    assert {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK"} <= set(settings)
    assert "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL" not in settings, "a container's log is all that its keeper sees"


def test_the_image_runs_as_nobody_special_on_a_supported_python() -> None:
    text = dockerfile()
    (python,) = re.findall(r"^FROM python:(\S+)-slim$", text, re.MULTILINE)
    assert PROJECT["requires-python"].startswith(f">={python}.")  # the image's is the newest of that minor version
    assert "useradd --uid 1000 " in text
    assert text.index("useradd") < text.index("\nUSER 1000:1000\n") < text.index("\nCMD ")


def test_the_build_sees_what_the_image_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    seen = [line[1:] for line in lines if line.startswith("!")]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = ["pyproject.toml", PROJECT["readme"], *packages["packages"]]
    started = PROGRAMS + programs(containers()["deploy-jobs"]["command"])
    needed += [word.removeprefix(IN_IMAGE) for program in started for word in program if word.startswith(IN_IMAGE)]
    assert len(needed) == 10, needed
    assert not [path for path in needed if not any(path == s or path.startswith(f"{s}/") for s in seen)]
    assert all((ROOT / path).exists() for path in needed if path.startswith("infra/"))


# what is installed


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("fastapi", ["0.139.2", "0.150.0"], ["0.151.0", "0.154.0", "0.165.0"]),
        ("sqlalchemy", ["2.0.58"], ["2.1.0", "2.1.9"]),
        ("prefect", ["3.8.8"], ["3.8.7", "3.9.0"]),
        ("zarr", ["3.1.6"], ["4.0.0"]),
    ],
)
def test_a_version_that_breaks_us_is_not_allowed(name: str, good: list[str], bad: list[str]) -> None:
    (pin,) = [found for text in PROJECT["dependencies"] if (found := Requirement(text)).name == name]
    assert [found for found in [*good, *bad] if found in pin.specifier] == good
    assert version(name) in pin.specifier


def test_no_file_names_a_place_of_one_machine() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    place = re.compile(rb"(?<![\w.])/(?:home|root|Users|tmp|work)/\w|\b[A-Z]:\\\\?\w")
    assert place.search(b'root = "' + b"/home" + b'/ann/data"')
    tracked = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(tracked) > 10
    assert [str(file.relative_to(ROOT)) for file in tracked if place.search(_text_of(file))] == []


def _text_of(file: Path) -> bytes:
    """Its bytes; of a picture what is written beside its pixels, which look like anything when they are compressed."""
    if file.suffix != ".png":
        return file.read_bytes()
    with Image.open(file) as picture:
        return repr(picture.info).encode()


# a real server


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a client of a Prefect server that the command of compose.yaml started, on a free port and a new database."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | server.QUIET
    ours |= {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    looks_often = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1"}
    (command,) = programs(OURS["server"])
    command = [{"0.0.0.0": "127.0.0.1", "4200": str(port)}.get(word, word) for word in command]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(on_this_machine(command), env=ours | looks_often, stdout=log, stderr=log, text=True)
        try:
            assert eventually(lambda: answers(ours["PREFECT_API_URL"]), within=60, every=0.5)
            yield ours
        finally:
            process.terminate()
            eventually(lambda: process.poll() is not None, within=10)
            stop(process)


def on_this_machine(program: list[str]) -> list[str]:
    """The program run by this interpreter, with the checkout's files instead of the image's."""
    return [sys.executable, "-m", *(word.replace(IN_IMAGE, f"{ROOT}/") for word in program)]


def prefect(environment: dict[str, str], program: list[str], folder: Path) -> str:
    done = subprocess.run(
        on_this_machine(program), env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(environment: dict[str, str], method: str, path: str, body: object = None) -> Any:
    """What the server's API answers."""
    request = urllib.request.Request(f"{environment['PREFECT_API_URL']}/{path}", method=method)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, None if body is None else json.dumps(body).encode(), timeout=30) as answer:
        return json.loads(answer.read() or "null")


def test_prefect_yaml_is_deployed_a_worker_takes_it_up_and_its_night_is_scheduled(
    environment: dict[str, str], tmp_path: Path
) -> None:
    for program in programs(OURS["deploy"]):
        prefect(environment, program, tmp_path)
    listed = prefect(environment, ["prefect", "deployment", "ls"], tmp_path)  # HTTP 422 with fastapi 0.151 to 0.154
    assert "benchmark/local" in listed
    assert "nightly/local" in listed
    (worker,) = programs(OURS["worker"])
    assert "started" in prefect(environment, [*worker, "--run-once"], tmp_path)

    for kind, template in POOLS.items():  # the server checks the job variables of a deployment against its pool's
        ask(environment, "POST", "work_pools/", {"name": kind, "type": kind, "base_job_template": template})
        given = {"work_pool_name": kind, "job_variables": PREFECT_YAML["deployments"][0]["work_pool"]["job_variables"]}
        benchmark = ask(environment, "GET", "deployments/name/benchmark/local")
        ask(environment, "POST", "deployments/", {"name": kind, "flow_id": benchmark["flow_id"], **given})

    nightly = ask(environment, "GET", "deployments/name/nightly/local")
    assert nightly["pull_steps"] == [], "nothing may tie a deployment to the folder it was made in"
    runs = {"deployments": {"id": {"any_": [nightly["id"]]}}}
    assert ask(environment, "POST", "flow_runs/filter", runs) == []
    (schedule,) = nightly["schedules"]
    ask(environment, "PATCH", f"deployments/{nightly['id']}/schedules/{schedule['id']}", {"active": True})
    # With sqlalchemy 2.1 the scheduler fails for ever, silently.
    assert eventually(lambda: ask(environment, "POST", "flow_runs/filter", runs), within=30, every=0.5)
    first = min(run["expected_start_time"] for run in ask(environment, "POST", "flow_runs/filter", runs))
    assert first[11:16] == "02:00"
