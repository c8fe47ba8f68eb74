"""What the tests of the chart, the manifests and the image share. All of them work offline, without a cluster."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


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
