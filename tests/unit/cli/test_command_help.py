"""`tidegate COMMAND --help` of the services, which have no options: for people, not for who calls a function."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tidegate.cli.__main__ import COMMANDS, app


@pytest.mark.parametrize("name", [name for name, (target, _) in COMMANDS.items() if target.endswith(":main")])
def test_the_help_of_a_service_says_what_it_is_and_how_it_is_configured(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert COMMANDS[name][1] in result.stdout
    assert "environment variables that start with TIDEGATE_" in result.stdout
    assert "returns" not in result.stdout
