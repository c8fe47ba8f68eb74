"""`tidegate dev`: what it prints, what it refuses, and what `--fresh` removes. Started for real in test_one_command.py."""

from __future__ import annotations

import itertools
import shlex
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate.cli import dev
from tidegate.embedded.data_folder import MARKER, DataFolder, DataFolderError
from tidegate.embedded.ports import choose_port
from tidegate.embedded.stack import Stack, StackError
from tidegate.embedded.supervisor import ProcessStatus
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.settings import KafkaSettings


def used(folder: Path, *, held: bool = False) -> DataFolder:
    """Leave the folder as a stack does, with something kept in it."""
    data = DataFolder(folder)
    data.hold()
    (folder / "logs").mkdir()
    (folder / "logs/gate-0.log").write_text("a line")
    (folder / "sql.json").write_text('{"url": "http://127.0.0.1:1"}')
    (folder / "gateway.json").write_text('{"url": "http://127.0.0.1:2"}')
    if not held:
        data.release()
    return data


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the data folder ---------------------------------------------------------


def test_what_a_stack_made_is_removed_and_nothing_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo").write_text("dear")
    data = used(tmp_path / "data")
    (tmp_path / "data/link").symlink_to(tmp_path / "mine")
    data.empty()
    assert names(tmp_path / "data") == {MARKER}
    assert (tmp_path / "mine/photo").exists()
    data.hold()  # it is as usable, and as much a stack's own, as at first
    (tmp_path / "data/logs").mkdir()
    data.release()
    data.empty()
    assert names(tmp_path / "data") == {MARKER}


def test_a_folder_that_a_stack_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo").write_text("dear")
    with pytest.raises(DataFolderError, match="may not have made"):
        DataFolder(tmp_path).empty()
    used(tmp_path)  # using it does not make it a stack's own
    with pytest.raises(DataFolderError, match="may not have made"):
        DataFolder(tmp_path).empty()
    assert "photo" in names(tmp_path)
    assert "logs" in names(tmp_path)


@pytest.mark.parametrize("place", ["current folder", "home"])
@pytest.mark.parametrize("below", ["", "project"])
def test_neither_the_home_nor_the_current_folder_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, below: str
) -> None:
    used(tmp_path)
    (tmp_path / below).mkdir(exist_ok=True)
    if place == "home":
        monkeypatch.setenv("HOME", str(tmp_path / below))
    else:
        monkeypatch.chdir(tmp_path / below)
    with pytest.raises(DataFolderError, match="is not emptied"):
        DataFolder(tmp_path).empty()
    assert "logs" in names(tmp_path)


def test_a_folder_in_use_is_neither_emptied_nor_used_a_second_time(tmp_path: Path) -> None:
    holder = used(tmp_path, held=True)
    with pytest.raises(DataFolderError, match="in use"):
        DataFolder(tmp_path).empty()
    with pytest.raises(StackError, match="in use"):
        Stack(tmp_path).start()
    assert names(tmp_path) == {MARKER, "logs", "sql.json", "gateway.json"}
    holder.release()
    DataFolder(tmp_path).empty()


def test_a_stack_that_did_not_start_lets_the_folder_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kafka(_: object) -> None:
        with pytest.raises(DataFolderError, match="in use"):
            DataFolder(tmp_path).hold()
        raise EventLogError("no room")

    monkeypatch.setattr("tidegate.embedded.stack.EmbeddedKafka.start", no_kafka)
    stack = Stack(tmp_path)
    with pytest.raises(EventLogError), stack:
        pass
    DataFolder(tmp_path).hold()


def test_what_is_no_folder_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataFolderError, match="not a folder"):
        DataFolder(tmp_path / "file").empty()
    with pytest.raises(StackError, match="cannot be used"):
        Stack(tmp_path / "file").start()
    DataFolder(tmp_path / "new").empty()
    assert names(tmp_path) == {"file"}


# --- the command -------------------------------------------------------------


class _Stack:
    """What the command needs of a stack, started by nobody."""

    failure: Exception | None = None

    def __init__(self, data_dir: Path, **_: Any) -> None:
        self.data_dir = data_dir.absolute()
        self.settings = KafkaSettings(bootstrap="127.0.0.1:7")

    def __enter__(self) -> _Stack:
        if self.failure is not None:
            raise self.failure
        if not self.data_dir.exists():
            used(self.data_dir)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def status(self) -> list[ProcessStatus]:
        log = self.data_dir / "logs/gate-0.log"
        return [ProcessStatus("gate-0", 42, "running", 1, 1.0, None, log, ())]


class _Client:
    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def publish(self, _: object) -> list[str]:
        return ["support"]


def run_dev(monkeypatch: pytest.MonkeyPatch, *words: str, failure: Exception | None = None) -> Any:
    stopped = threading.Event()
    stopped.set()
    monkeypatch.setattr(_Stack, "failure", failure)
    monkeypatch.setattr(dev, "Stack", _Stack)
    monkeypatch.setattr(dev, "Client", _Client)
    monkeypatch.setattr(dev, "stop_on_signals", lambda: stopped)
    return CliRunner().invoke(dev.app, list(words), env={"COLUMNS": "80"})


@pytest.mark.feature("O4")
def test_the_hints_work_from_any_folder_and_lines_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"a folder [bold]{'x' * 80}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    result = run_dev(monkeypatch, "--data-dir", "here")
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "export TIDEGATE_KAFKA_BOOTSTRAP=127.0.0.1:7" in lines
    assert f"export TIDEGATE_DATA_DIR={shlex.quote(str(folder / 'here'))}" in lines
    (health,) = [line for line in lines if line.startswith("running")]
    assert health.endswith(f"pid 42, started again 1 time  log {folder}/here/logs/gate-0.log")


def test_fresh_refuses_what_is_not_a_stacks_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo").write_text("dear")
    result = run_dev(monkeypatch, "--fresh", "--data-dir", str(tmp_path))
    assert result.exit_code == 2
    assert "Name another --data-dir" in result.stderr
    assert names(tmp_path) == {"photo"}


def test_fresh_empties_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used(tmp_path)
    failure = StackError("stop here")
    assert run_dev(monkeypatch, "--fresh", "--data-dir", str(tmp_path), failure=failure).exit_code == 1
    assert names(tmp_path) == {MARKER}


def test_a_kafka_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_dev(monkeypatch, "--data-dir", str(tmp_path / "new"), failure=EventLogError("no answer"))
    assert result.exit_code == 1
    assert "error: Kafka at 127.0.0.1:7: no answer" in result.stderr


@pytest.mark.feature("K4")
@pytest.mark.parametrize("option", ["--kafka-port", "--sql-port", "--gateway-port"])
@pytest.mark.parametrize("port", ["-1", "70000", "http"])
def test_what_is_no_port_is_refused_before_anything_starts(
    option: str, port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(tmp_path)
    result = run_dev(monkeypatch, option, port, "--fresh", "--data-dir", str(tmp_path), failure=StackError("started"))
    assert result.exit_code == 2
    assert option in result.stderr
    assert "logs" in names(tmp_path)


@pytest.mark.feature("K4")
@pytest.mark.parametrize("option", ["--sql-port", "--gateway-port"])
def test_a_port_that_is_taken_is_refused_before_anything_starts(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        words = (option, port, "--fresh", "--data-dir", str(tmp_path))
        result = run_dev(monkeypatch, *words, failure=StackError("started"))
    assert result.exit_code == 2
    assert f"error: {option} {port}: Address already in use on 127.0.0.1; choose another port" in result.stderr
    assert "logs" in names(tmp_path)


@pytest.mark.feature("K4")
def test_two_parts_do_not_get_one_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(choose_port())
    monkeypatch.delenv("TIDEGATE_KAFKA_BOOTSTRAP", raising=False)
    for options in itertools.combinations(["--kafka-port", "--sql-port", "--gateway-port"], 2):
        words = [word for option in options for word in (option, port)]
        result = run_dev(monkeypatch, *words, "--data-dir", str(tmp_path / "new"), failure=StackError("started"))
        assert result.exit_code == 2
        assert f"{options[0]} and {options[1]} are both {port}" in result.stderr
    monkeypatch.setenv("TIDEGATE_KAFKA_BOOTSTRAP", "127.0.0.1:7")  # then none is started here
    words = ["--kafka-port", port, "--sql-port", port, "--data-dir", str(tmp_path / "new")]
    assert run_dev(monkeypatch, *words, failure=StackError("started")).exit_code == 1
