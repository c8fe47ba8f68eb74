"""What the tests of the chart, the manifests and the image share. All of them work offline, without a cluster."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;]+) \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def locked(path: Path) -> dict[str, str]:
    """Return the versions that a lock file pins; fails on a line of any other kind."""
    versions: dict[str, str] = {}
    hashes = 0
    for line in path.read_text().splitlines():
        if found := PINNED.match(line):
            assert not versions or hashes, f"{list(versions)[-1]} has no hash"
            versions[canonicalize_name(found[1])], hashes = found[2], 0
        elif HASH.match(line):
            hashes += 1
        else:
            assert line.lstrip().startswith("#"), line
            assert "://" not in line, line
    assert hashes
    return versions


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def render_script() -> ModuleType:
    """The script k8s/render.py, which lives outside of any package."""
    spec = importlib.util.spec_from_file_location("k8s_render", ROOT / "k8s/render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def render(render_script: ModuleType) -> Callable[..., list[dict[str, Any]]]:
    """Render the chart: `render(values, release=...)` returns its objects, hooks included."""
    rendered: Callable[..., list[dict[str, Any]]] = render_script.rendered_chart
    return rendered


@pytest.fixture(scope="session")
def values_files() -> dict[str, dict[str, Any]]:
    """The values of every environment, by name of the file."""
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "helm").glob("values-*.yaml"))}
