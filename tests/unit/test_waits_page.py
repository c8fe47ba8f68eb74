"""The examples of docs/waits-and-control.md: graphs are built, definitions and requests checked, command lines parsed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tidegate import App
from tidegate.cli.__main__ import app as cli
from tidegate.domain.requests import validate
from tidegate.domain.workflow import validate_definition

PAGE = (Path(__file__).resolve().parents[2] / "docs/waits-and-control.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found, f"the page has no {language}"
    return found


@pytest.mark.feature("D3")
@pytest.mark.parametrize("text", blocks("python"))
def test_python_on_the_page_makes_an_app_that_can_be_published(text: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(text, "waits-and-control.md", "exec"), names)  # noqa: S102 - the page of this repository
    made: App = names["app"]
    made.check()
    for definition in made.definitions():
        assert {node["kind"] for node in definition["nodes"].values()} >= {"wait_event", "ask", "wait_until", "sleep"}


def test_definitions_on_the_page_can_run() -> None:
    for text in blocks("yaml"):
        assert validate_definition(yaml.safe_load(text)) == []


def test_requests_on_the_page_are_taken() -> None:
    for line in "".join(blocks("json")).splitlines():
        validate(json.loads(line))


@pytest.mark.parametrize("line", "".join(blocks("console")).splitlines())
def test_commands_on_the_page_are_understood(line: str) -> None:
    name, *words = shlex.split(line)
    assert name == "tidegate"
    command: Any = typer.main.get_command(cli)
    context = command.make_context("tidegate", words, resilient_parsing=False)
    while hasattr(command, "get_command"):
        rest = [*context._protected_args, *context.args]
        command = command.get_command(context, rest[0])
        assert command is not None, line
        context = command.make_context(rest[0], rest[1:], parent=context)


def test_what_is_shipped_on_the_page_is_the_order_and_not_the_answer_before_it() -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[0], "waits-and-control.md", "exec"), names)  # noqa: S102 - the page of this repository
    (built,) = names["app"].definitions()
    for definition in (built, yaml.safe_load(blocks("yaml")[0])):
        assert definition["nodes"]["ship"]["input"] == "${ input }"
