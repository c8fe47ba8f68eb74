"""A replay that goes on in another projection while whoever had it before does not know yet that it is not theirs any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from support.stack import eventually
from tidegate import metrics
from tidegate.eventlog.memory import MemoryBroker
from tidegate.projection import control, shadow
from tidegate.projection.control import BusyError, Replays
from tidegate.projection.replay import (
    CLEAN,
    COMPARE,
    EXCHANGE,
    PREPARE,
    GivenUp,
    Parts,
    Progress,
    Replay,
    ReplayRequest,
    load_all,
)
from tidegate.projection.service import TOPICS, Limits
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.store import Store, StoreError

pytestmark = [pytest.mark.feature("L4"), pytest.mark.timeout(120)]
DATABASE, SHADOW = "tidegate", "tidegate_replay"
TABLES = ("run_state", "event_facts")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Parts, Store]]:
    """Parts over empty topics and an engine that both projections can open, as a server is."""
    folder = tmp_path_factory.mktemp("engine")
    broker = MemoryBroker()
    for topic in (*TOPICS, "schemas"):
        broker.create_topic(topic, 1)

    def open_store(database: str) -> Store:
        return Store.open(ProjectionSettings(clickhouse_url=f"chdb://{folder}", clickhouse_database=database))

    keep = open_store(DATABASE)
    keep.command(shadow.MAKE_REPLAYS)
    yield Parts(broker, open_store, DATABASE, lambda *_: 0, Limits(0.01, 1000, 10**6)), keep
    keep.close()


@pytest.fixture
def parts(engine: tuple[Parts, Store]) -> Parts:
    parts, keep = engine
    keep.command(f"TRUNCATE TABLE {shadow.REPLAYS}")
    shadow.drop(keep, SHADOW)
    return parts


def stepped(parts: Parts, phase: str) -> Replay:
    """Return a replay of some tables that is at a step."""
    request = ReplayRequest(tables=TABLES)
    replay = Replay(parts, Progress(replay_id="r", instance_id="a", request=request), threading.Event())
    while replay.progress.phase != phase:
        replay._step()
    return replay


def test_a_shadow_that_somebody_made_anew_is_not_put_in_place(parts: Parts) -> None:
    replay = stepped(parts, EXCHANGE)
    store = replay._live()
    before = shadow.uuids(store, DATABASE)
    store.command(
        f"INSERT INTO {SHADOW}.event_facts (run_id, seq, type, body) VALUES ('filled', 1, 'RunStarted', '{{}}')"
    )
    stepped(parts, COMPARE)  # whoever had it before begins once more

    replay._step()
    assert replay.progress.phase == PREPARE
    assert shadow.uuids(store, DATABASE) == before
    replay.run()
    assert replay.progress.phase == "done"
    store = parts.open_store(DATABASE)
    changed = {name for name, uuid in shadow.uuids(store, DATABASE).items() if uuid != before[name]}
    store.close()
    assert changed == set(TABLES)


def test_a_table_that_somebody_put_back_is_put_in_place_again(parts: Parts) -> None:
    replay = stepped(parts, CLEAN)
    shadow.exchange(replay._live(), DATABASE, SHADOW, TABLES[0])

    replay._step()
    assert replay.progress.phase == EXCHANGE
    replay.run()
    assert replay.progress.phase == "done"
    store = parts.open_store(DATABASE)
    assert shadow.uuids(store, DATABASE)[TABLES[0]] == replay.progress.rebuilt[TABLES[0]]
    store.close()


def test_who_loses_the_first_partition_leaves_the_rest_to_who_has_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOOK_EVERY_S", 0.05)
    comparing, go_on = threading.Event(), threading.Event()
    compare = shadow.compare

    def slowly(*arguments: Any) -> Any:
        if not comparing.is_set():
            comparing.set()
            go_on.wait(60)
        return compare(*arguments)

    monkeypatch.setattr(shadow, "compare", slowly)
    first = ["a"]
    members = {
        name: Replays(parts, name, is_first=lambda name=name: name in first, has_company=True) for name in ("a", "b")
    }
    for member in members.values():
        member.resume()
    asked = members["a"].ask(ReplayRequest(tables=TABLES))
    assert comparing.wait(60)
    first[:] = ["b"]
    eventually(lambda: (found := members["b"].current()) is not None and found.is_over, "b to have done it")
    go_on.set()  # a hears of it late, and writes down what it has done
    eventually(lambda: members["a"]._replay is None, "a to give it up")
    store = parts.open_store(DATABASE)
    (done,) = load_all(store)
    store.close()
    assert (done.phase, done.instance_id, done.replay_id) == ("done", "b", asked.replay_id)
    for member in members.values():
        current = member.current()
        assert current is not None
        assert current.phase == "done"
        member.close()


def test_who_leaves_a_replay_to_somebody_else_does_not_go_on_saying_how_far_it_is(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[float] = []
    monkeypatch.setattr(metrics.projection_replay, "set", said.append)
    ours = [True]
    replay = Replay(
        parts,
        Progress(replay_id="r", instance_id="a", request=ReplayRequest(tables=TABLES)),
        threading.Event(),
        ours=lambda: ours[0],
    )
    while replay.progress.phase != COMPARE:
        replay._step()
    assert said == [1.0]
    ours[0] = False
    with pytest.raises(GivenUp):
        replay.run()
    assert said[-1] == -1


def test_a_replay_of_a_version_that_did_not_note_what_it_filled_fills_anew(parts: Parts) -> None:
    replay = stepped(parts, COMPARE)
    replay.progress.rebuilt = {}
    store = parts.open_store(DATABASE)
    before = shadow.uuids(store, SHADOW)
    replay.run()
    assert replay.progress.phase == "done"
    assert shadow.uuids(store, DATABASE)["event_facts"] not in before.values()
    store.close()


def test_what_was_asked_for_while_clickhouse_was_away_is_done_when_it_is_back(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(control, "AGAIN_AFTER_S", 0.05)
    opened: list[str] = []

    def open_store(database: str) -> Store:
        opened.append(threading.current_thread().name)
        if opened[-1] == "replay" and opened.count("replay") == 2:
            raise StoreError("away")
        return parts.open_store(database)

    alone = Replays(parts._replace(open_store=open_store), "a")
    alone.resume()
    eventually(lambda: alone._is_looking is False, "it to look around")
    alone.ask(ReplayRequest(tables=TABLES, check=True))
    eventually(lambda: (found := alone.current()) is not None and found.is_over, "it to be done")
    assert opened.count("replay") > 2
    alone.close()


def test_any_member_may_be_asked_and_the_one_with_the_first_partition_does_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOOK_EVERY_S", 0.05)
    first: list[str] = []  # while the group gives out its partitions, nobody has the first one
    members = {
        name: Replays(parts, name, is_first=lambda name=name: name in first, has_company=True) for name in ("a", "b")
    }
    for member in members.values():
        member.resume()
    eventually(lambda: members["a"]._is_looking is False, "a to look around")
    with pytest.raises(BusyError, match="no replay"):
        members["a"].cancel()

    asked = members["a"].ask(ReplayRequest(tables=TABLES))
    assert members["b"].ask(ReplayRequest(check=True)).replay_id == asked.replay_id, "one at a time, whoever is asked"
    with pytest.raises(BusyError, match="the projection a does the replay"):
        members["b"].cancel()
    first.append("b")
    for member in members.values():
        eventually(lambda m=member: (found := m.current()) is not None and found.is_over, "it to be done")
    store = parts.open_store(DATABASE)
    (done,) = load_all(store)
    store.close()
    assert (done.phase, done.instance_id, done.replay_id) == ("done", "b", asked.replay_id)
    for member in members.values():
        member.close()
