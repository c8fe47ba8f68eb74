"""`tidegate dead-letters` on a whole system: what died is found, shown as it was, and sent again where that makes sense."""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from support.stack import WholeStack, eventually
from tidegate import codec
from tidegate.cli.__main__ import app
from tidegate.domain import canonical
from tidegate.domain.messages import WorkflowPublished
from tidegate.eventlog.letter_box import REDRIVES_HEADER
from tidegate.eventlog.letters import MAX_ORIGINAL_BYTES

REFUSED, USAGE, NO_ANSWER = 4, 2, 3

pytestmark = [pytest.mark.feature("O4"), pytest.mark.feature("G1")]


def new_id(word: str) -> str:
    return f"{word}-{uuid.uuid4().hex[:8]}"


class Cli:
    """The command in this process; what it prints on both outputs is kept apart."""

    def __init__(self, whole: WholeStack) -> None:
        self._environment = {"TIDEGATE_KAFKA_BOOTSTRAP": whole.stack.settings.bootstrap}

    def __call__(self, *words: str, code: int = 0) -> Result:
        done = CliRunner().invoke(app, ["dead-letters", *words], env=self._environment)
        assert done.exit_code == code, f"{words}: {done.exit_code}\n{done.stdout}\n{done.stderr}\n{done.exception}"
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json").stdout)


@pytest.fixture
def cli(whole: WholeStack) -> Cli:
    return Cli(whole)


def publish(whole: WholeStack, name: str) -> None:
    """Publish a workflow of one step, under a name that came too late for somebody."""
    definition = {
        "name": name,
        "version": "1",
        "nodes": {"a": {"kind": "step", "function": "one"}},
        "functions": {"one": {"kind": "step"}},
    }
    text = canonical.dumps(definition)
    row = WorkflowPublished(
        name=name, version="1", definition_hash=canonical.digest(text), definition=text, by="t", at_ms=0
    )
    whole.produce("workflows", codec.encode(row), key=f"{name}@1".encode(), partition=0)


def died(whole: WholeStack, value: bytes, **options: Any) -> str:
    source = whole.produce("run-requests", value, **options)
    whole.letter(source)
    return source


def test_letters_are_listed_by_what_they_are_about(cli: Cli, whole: WholeStack) -> None:
    run_id = new_id("listed")
    first = whole.request({"run_id": run_id, "workflow": "no_such"})
    whole.letter(first)
    second = died(whole, b"\x1b[31mnot json")
    of_run = cli.json("list", "--run", run_id)
    assert [letter["letter"] for letter in of_run["letters"]] == [first]
    assert of_run["letters"][0]["code"] == "unknown_workflow"
    assert "no_such" in of_run["letters"][0]["reason"]
    latest = cli.json("list", "-n", "1")
    assert [letter["letter"] for letter in latest["letters"]] == [second]
    assert latest["count"] > 1
    assert second in [
        letter["letter"] for letter in cli.json("list", "--since", "1h", "--code", "malformed")["letters"]
    ]
    assert cli.json("list", "--since", "2999-01-01")["letters"] == []
    assert cli.json("list", "--topic", "step-results", "--run", run_id)["count"] == 0
    table = cli("list", "--run", run_id).stdout
    assert first in table
    assert "1 letter" in table
    assert "--since" in cli("list", "--since", "yesterday", code=USAGE).stderr


def test_a_letter_is_shown_as_it_was(cli: Cli, whole: WholeStack) -> None:
    value = b'{"workflow": "chain", "inputs": {"n": "\xc3\xa4"}}'
    source = died(whole, value, key=b"its key \xff", headers=[("trace", b"\x00\x01")])
    page = cli("show", source).stdout
    assert '  "inputs": {' in page, "JSON is laid out"
    assert "did you mean `input`" in page
    assert r"its key \xff" in page
    assert r"trace: \x00\x01" in page
    body = cli.json("show", source)
    assert base64.b64decode(body["original_base64"]) == value
    assert base64.b64decode(body["key_base64"]) == b"its key \xff"
    assert {name: base64.b64decode(text) for name, text in body["headers_base64"].items()} == {"trace": b"\x00\x01"}
    assert "there is no dead letter" in cli("show", "run-requests:0:123456789", code=REFUSED).stderr


def test_what_is_shown_cannot_steer_a_terminal(cli: Cli, whole: WholeStack) -> None:
    source = died(whole, b"\x1b]0;owned\x07[red]", key=b"\x1b[2J")
    page = cli("show", source).stdout
    assert "\x1b" not in page
    assert "[red]" in page
    assert cli("show", source, "--raw").stdout_bytes == b"\x1b]0;owned\x07[red]"


def test_a_request_that_came_too_early_is_sent_again_and_runs(cli: Cli, whole: WholeStack) -> None:
    name = new_id("late").replace("-", "_")
    value = canonical.dumps({"workflow": name, "input": 5}).encode()
    source = died(whole, value, key=b"whose", headers=[("trace", b"t-1")])
    publish(whole, name)
    assert "would go to run-requests" in cli("redrive", source, "--dry-run").stdout
    assert cli.json("show", source)["redriven_as"] == []
    said = cli("redrive", source)
    again = said.stdout.rsplit(" ", 1)[-1].strip()
    assert said.stdout.startswith(f"{source}: {len(value)} bytes sent again as run-requests:")
    assert whole.wait(again.replace(":", "-")).output == 6
    topic, partition, offset = again.split(":")
    (sent,) = whole.broker.read(topic, int(partition), int(offset), int(offset) + 1)
    assert (sent.key, sent.value) == (b"whose", value)
    assert dict(sent.headers) == {"trace": b"t-1", REDRIVES_HEADER: source.encode()}
    assert cli.json("show", source)["redriven_as"] == [again]

    twice = cli("redrive", source, code=REFUSED)
    assert again in twice.stderr
    assert "--again" in twice.stderr
    assert "sent again as" in cli("redrive", source, "--again").stdout
    assert len(cli.json("show", source)["redriven_as"]) == 2


def test_a_start_whose_run_id_is_used_up_needs_a_new_one(cli: Cli, whole: WholeStack) -> None:
    name, run_id = new_id("other").replace("-", "_"), new_id("used-up")
    source = whole.request({"workflow": name, "input": 5, "run_id": run_id})
    whole.letter(source)
    publish(whole, name)
    assert "--new-id" in cli("redrive", source, code=REFUSED).stderr
    again = cli("redrive", "--run", run_id, "--new-id").stdout.rsplit(" ", 1)[-1].strip()
    topic, partition, offset = again.split(":")
    (sent,) = whole.broker.read(topic, int(partition), int(offset), int(offset) + 1)
    assert whole.wait(json.loads(sent.value or b"")["run_id"]).output == 6


def test_what_was_cut_or_follows_from_a_log_is_not_sent_again(cli: Cli, whole: WholeStack) -> None:
    long = died(whole, b"{" + b"x" * MAX_ORIGINAL_BYTES)
    inside = whole.produce("step-results", b"garbage", partition=0)
    whole.letter(inside)
    before = {at: whole.broker.offsets(*at).end for at in [("run-requests", n) for n in range(4)]}
    assert "the rest is not here" in cli("redrive", long, code=REFUSED).stderr
    assert "follow from logs" in cli("redrive", inside, code=REFUSED).stderr
    done = cli("redrive", long, inside, "nothing:0:0", code=REFUSED)
    assert "there is no dead letter nothing:0:0" in done.stderr
    assert "0 of 3 letters sent again" in done.stderr
    assert {at: whole.broker.offsets(*at).end for at in before} == before


def test_which_letters_must_be_said(cli: Cli) -> None:
    assert "not both" in cli("redrive", code=USAGE).stderr
    assert "not both" in cli("redrive", "a:0:0", "--code", "malformed", code=USAGE).stderr


def test_garbage_among_the_letters_is_passed_over(cli: Cli, whole: WholeStack) -> None:
    good = died(whole, b"{")
    for value in (b"garbage", None, codec.encode(whole.letter(good))[:-3]):
        whole.produce("dead-letters", value, key=b"garbage:0:0", partition=0)
    eventually(lambda: any(one["letter"] == good for one in cli.json("list")["letters"]), "the letter to be listed")
    assert "there is no dead letter" in cli("show", "garbage:0:0", code=REFUSED).stderr
    whole.produce("dead-letters", None, key=b"garbage:0:0", partition=0)


def test_without_kafka_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.eventlog.kafka.clients.REQUEST_TIMEOUT_S", 0.5)
    result = CliRunner().invoke(app, ["dead-letters", "list"], env={"TIDEGATE_KAFKA_BOOTSTRAP": "127.0.0.1:1"})
    assert result.exit_code == NO_ANSWER
    assert "127.0.0.1:1" in result.stderr
