"""compose.yaml runs what there is: commands, settings, ports and the image's stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from typer.testing import CliRunner

from tidegate.cli.__main__ import app as cli
from tidegate.gateway.settings import GatewaySettings
from tidegate.projection.settings import ProjectionSettings
from tidegate.reference import OTHER_VARIABLES, groups
from tidegate.topics.declaration import SERVICES

pytestmark = pytest.mark.feature("K1")

PORTS: Final = {
    "projection": ProjectionSettings.model_fields["projection_sql_port"].default,
    "gateway": GatewaySettings.model_fields["gateway_port"].default,
}

Object = dict[str, Any]


@pytest.fixture(scope="module")
def services(root: Path) -> dict[str, Object]:
    """The containers, by name, with what they share filled in."""
    made: dict[str, Object] = yaml.safe_load((root / "compose.yaml").read_text())["services"]
    return made


def test_every_service_is_there_and_waits_for_its_topics(services: dict[str, Object]) -> None:
    assert set(services) == {*SERVICES, "kafka", "topics", "workflows", "tidegate"}
    for name in (*SERVICES, "workflows"):
        assert services[name]["depends_on"] == {"topics": {"condition": "service_completed_successfully"}}, name
        assert name == "workflows" or services[name]["command"][0] == name
    assert services["topics"]["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    assert "healthcheck" in services["kafka"]


def test_the_app_whose_workflows_are_published_is_the_one_that_is_served(services: dict[str, Object]) -> None:
    executor = services["executor"]["command"]
    assert services["workflows"]["command"][-1] == executor[executor.index("--app") + 1]


def test_every_command_exists_with_its_options(services: dict[str, Object]) -> None:
    for name, service in services.items():
        arguments = service.get("command", [])
        result = CliRunner().invoke(cli, [*arguments, "--help"])
        assert result.exit_code == 0, f"{name}: tidegate {' '.join(arguments)}: {result.output}"


def test_every_variable_is_a_setting(services: dict[str, Object]) -> None:
    known = {setting.variable for group in groups() for setting in group.settings} | OTHER_VARIABLES.keys()
    for name, service in services.items():
        assert set(service["environment"]) - {"HOME"} <= known, name


def test_addresses_lead_to_where_somebody_answers(services: dict[str, Object]) -> None:
    command = services["kafka"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    for name, service in services.items():
        host, _, port = service["environment"]["TIDEGATE_KAFKA_BOOTSTRAP"].partition(":")
        assert (host, port) == (options["--advertised-host"], options["--port"]), name
    assert options["--advertised-host"] in services
    assert f"'{options['--advertised-host']}', {options['--port']}" in services["kafka"]["healthcheck"]["test"][-1]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {name: [f"127.0.0.1:{port}:{port}"] for name, port in PORTS.items()}
    # From outside of the container they are reached only if they listen on more than its own loopback.
    assert services["projection"]["environment"]["TIDEGATE_PROJECTION_SQL_HOST"] == "0.0.0.0"  # noqa: S104
    assert services["gateway"]["environment"]["TIDEGATE_GATEWAY_HOST"] == "0.0.0.0"  # noqa: S104


def test_commands_find_who_answers_them(services: dict[str, Object]) -> None:
    asked = services["tidegate"]["environment"]
    assert asked["TIDEGATE_GATEWAY_URL"] == f"http://gateway:{PORTS['gateway']}"
    assert asked["TIDEGATE_SQL_URL"] == f"http://projection:{PORTS['projection']}"


def test_every_container_is_the_embedded_image_and_as_restricted_as_a_pod(
    services: dict[str, Object], root: Path
) -> None:
    dockerfile = (root / "services/Dockerfile").read_text()
    for name, service in services.items():
        build = service["build"]
        assert build["dockerfile"] == "services/Dockerfile", name
        assert f" AS {build['target']}\n" in dockerfile
        assert service["image"].endswith(build["target"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["environment"]["TIDEGATE_DATA_DIR"].startswith(service["tmpfs"][0]), (
            "nothing else can be written"
        )


def test_executors_can_be_as_many_as_one_likes(services: dict[str, Object]) -> None:
    """Which needs names that differ: none that is set, and no port that two would want."""
    executor = services["executor"]
    assert not {"container_name", "ports", "hostname"} & executor.keys()
    assert "TIDEGATE_INSTANCE_ID" not in executor["environment"]
    assert "--instance-id" not in executor["command"]
