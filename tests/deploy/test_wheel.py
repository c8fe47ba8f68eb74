"""The wheel holds all that the program reads, and works away from the sources."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.feature("K5")


@pytest.fixture(scope="module")
def unpacked(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own, as an installation has it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--wheel-dir", folder, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("tidegate-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


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


def test_it_works_away_from_the_sources(unpacked: Path, tmp_path: Path) -> None:
    """Nothing but the wheel and the libraries is there: no checkout, no variables of ours, another folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TIDEGATE_", "PYTHON"))}
    environment |= {"PYTHONPATH": str(unpacked), "HOME": str(tmp_path), "COLUMNS": "200"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tidegate.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "step-tasks.default" in run("topics", "list", "--json")
    assert "tidegate-gate" in run("topics", "acls", "--format", "json")
    for command in ("scheduler", "gate", "executor", "projection", "gateway", "smoke", "kafka"):
        assert command in run(command, "--help")
    found = subprocess.run(
        [sys.executable, "-c", "import tidegate; print(tidegate.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(unpacked)
