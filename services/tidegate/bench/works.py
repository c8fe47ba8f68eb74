"""The works: each warms up, measures, and returns its figures. What they mean is written in `docs/benchmarks.md`."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tidegate.bench import owners, pauses, sleepers
from tidegate.bench.app import STEPS_OF_CHAIN, STEPS_OF_THREE
from tidegate.bench.dataset import EVENT_COUNT, Note, panel_times_ms
from tidegate.bench.lab import EXECUTOR, Lab
from tidegate.bench.processes import Cost
from tidegate.bench.watcher import RunFailedError
from tidegate.embedded import sql
from tidegate.sdk.client import Client

Figure = dict[str, Any]

W1_RUNS: Final = (1_000, 10_000)
W2_RUNS: Final = 200
W3_REPEATS: Final = 3
W4_RUNS: Final = 100
W4_PACE_S: Final = 0.003
W4_REPEATS: Final = 3
W4_VICTIMS: Final = (EXECUTOR, "scheduler-0", "gate-0")
W5_RUNS: Final = 10_000
W5_REPEATS: Final = 3
W5_PROBES: Final = 64  # so that every partition has some
W7_RUNS: Final = 100_000
W7_TIMEOUT_S: Final = 3_600.0
W7_REST_S: Final = 12.0  # two checkpoints, and then some
W6_EVENTS_WANTED: Final = 200_000
HANDOVER_REPLICAS: Final = 3
HANDOVER_PACE_S: Final = 0.01
HANDOVER_BEFORE_S: Final = 2.0
HANDOVER_AFTER_S: Final = 15.0  # longer than a session
HANDOVER_REST_S: Final = 3.0
MEMORY_RUNS: Final = 100_000
MEMORY_CHUNK: Final = 5_000
SCALES: Final = (1, 2, 4)
SCALING_RUNS: Final = 5_000
EVENTS_PER_RUN: Final = 20  # of both logs, about: what decides how many runs a rebuild needs to be worth measuring
FIRST_WARM_UP_RUNS: Final = 3_000
WARM_UP_RUNS: Final = 200
TIMEOUT_S: Final = 900.0
ASK_EVERY_S: Final = 0.2
# Their one attempt was let through and waits for an executor.
ALIVE_COUNT: Final = (
    "SELECT uniqExact(run_id) AS n FROM ledger WHERE type = 'AttemptQueued' "
    "AND run_id IN (SELECT run_id FROM runs WHERE workflow = 'alive')"
)
STEPS_COUNT: Final = "SELECT uniqExact(run_id, seq) AS n FROM events WHERE type = 'StepSucceeded'"
ASLEEP_COUNT: Final = "SELECT uniqExact(run_id) AS n FROM events WHERE type = 'WaitStarted'"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each work is done."""

    w1_runs: tuple[int, ...] = W1_RUNS
    w2_runs: int = W2_RUNS
    w4_runs: int = W4_RUNS
    w4_repeats: int = W4_REPEATS
    w5_runs: int = W5_RUNS
    w6_events: int = W6_EVENTS_WANTED
    w7_runs: int = W7_RUNS
    memory_runs: int = MEMORY_RUNS
    scaling_runs: int = SCALING_RUNS
    first_warm_up_runs: int = FIRST_WARM_UP_RUNS
    warm_up_runs: int = WARM_UP_RUNS

    @staticmethod
    def of(runs: int | None) -> Sizes:
        """Return the standard sizes, or small ones around `runs`."""
        if runs is None:
            return Sizes()
        return Sizes(
            w1_runs=(runs,),
            w2_runs=runs,
            w4_runs=runs,
            w4_repeats=1,
            w5_runs=runs,
            w6_events=runs * EVENTS_PER_RUN,
            w7_runs=runs,
            memory_runs=runs,
            scaling_runs=runs,
            first_warm_up_runs=min(runs, FIRST_WARM_UP_RUNS),
            warm_up_runs=min(runs, WARM_UP_RUNS),
        )


def run_works(lab: Lab, names: Iterable[str], sizes: Sizes) -> Iterable[Figure]:
    """Do the works in the order of the names; yield each figure when it is there. Raises TimeoutError, RunFailedError."""
    _warm_up(lab, sizes.first_warm_up_runs, "the broker's Java is compiled while it works")
    for name in names:
        yield from WORKS[name](lab, sizes)


# -- W1: throughput ---------------------------------------------------------------


def w1_throughput(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Runs of three steps, asked for as fast as the log takes them, whatever becomes of the earlier ones."""
    for runs in sizes.w1_runs:
        yield _at_once(lab, "W1", runs, sizes.warm_up_runs)


def _at_once(lab: Lab, work: str, runs: int, warm_up_runs: int) -> Figure:
    _warm_up(lab, warm_up_runs)
    _settle(lab)
    lab.say(f"{work}: {runs} runs of {STEPS_OF_THREE} steps at once")
    load = _load()
    with lab.meter() as meter:
        asked = lab.request_many("three", runs)
        ended = lab.wait(asked, TIMEOUT_S)
        done_at_s = max(ended.values())
        ends = sql.log_ends(lab.broker)
        behind = sql.lag(lab.data_dir, ends)
        caught_up_at_s = sql.wait_caught_up(lab.data_dir, ends, TIMEOUT_S)
    seconds = done_at_s - min(asked.values())
    return _figure(
        work,
        load,
        meter.costs(),
        runs=runs,
        steps=runs * STEPS_OF_THREE,
        seconds=round(seconds, 2),
        steps_per_s=round(runs * STEPS_OF_THREE / seconds),
        **_latencies(asked, ended),
        projection_lag_records=behind,
        projection_caught_up_s=round(max(0.0, caught_up_at_s - done_at_s), 2),
    )


# -- scaling ---------------------------------------------------------------


def scaling(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """W1 with 1, 2 and 4 schedulers and as many gates: what a step costs then, over all processes of a kind.

    Raises RunFailedError if not all of them shared the work from beginning to end, or if the log holds another number of steps.
    """
    for replicas in SCALES:
        for service in pauses.LOG_OF:
            lab.scale(service, replicas)
        _wait_for(partial(_is_shared, lab, replicas), f"the partitions of {replicas} owners each")
        _warm_up(lab, sizes.warm_up_runs)
        before, steps_before = _owners(lab), _steps_in_log(lab)
        figure = _at_once(lab, "SC", sizes.scaling_runs, 1)
        steps = _steps_in_log(lab) - steps_before - STEPS_OF_THREE
        if _owners(lab) != before or steps != figure["steps"]:
            raise RunFailedError(f"{steps} of {figure['steps']} steps, owned by {before} and then by {_owners(lab)}")
        for service in pauses.LOG_OF:
            parts = [figure["processes"].pop(name) for name in list(figure["processes"]) if name.startswith(service)]
            figure["processes"][service] = {
                "cpu_s": round(sum(part["cpu_s"] for part in parts), 2),
                "peak_rss_mib": max(part["peak_rss_mib"] for part in parts),
            }
        cpu_s = sum(cost["cpu_s"] for cost in figure["processes"].values())
        took_s = figure["seconds"] + figure["projection_caught_up_s"]  # the processes were metered until then
        figure |= {
            "replicas": replicas,
            "cpu_ms_per_step": round(1_000 * cpu_s / figure["steps"], 3),
            "cores_used": round(cpu_s / took_s, 2),
        }
        yield figure
    for service in pauses.LOG_OF:
        lab.scale(service, 1)


def _owners(lab: Lab) -> dict[str, dict[int, str]]:
    return {service: owners.of_partitions(lab.broker, topic) for service, topic in pauses.LOG_OF.items()}


def _is_shared(lab: Lab, replicas: int) -> bool:
    return all(owners.are_spread(found, service, replicas) for service, found in _owners(lab).items())


def _steps_in_log(lab: Lab) -> int:
    _settle(lab)
    return _count(lab, STEPS_COUNT)


# -- W2: latency ---------------------------------------------------------------


def w2_one_at_a_time(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Runs of three steps, each asked for when the one before it was seen to end."""
    _warm_up(lab, sizes.warm_up_runs)
    _one_by_one(lab, max(1, sizes.w2_runs // 4))
    _settle(lab)
    lab.say(f"W2: {sizes.w2_runs} runs of {STEPS_OF_THREE} steps, one at a time")
    load = _load()
    with lab.meter() as meter:
        asked, ended = _one_by_one(lab, sizes.w2_runs)
    yield _figure("W2", load, meter.costs(), runs=sizes.w2_runs, **_latencies(asked, ended))


def _one_by_one(lab: Lab, runs: int) -> tuple[dict[str, float], dict[str, float]]:
    asked: dict[str, float] = {}
    ended: dict[str, float] = {}
    for _ in range(runs):
        run_id, asked_at_s = lab.request("three")
        asked[run_id] = asked_at_s
        ended |= lab.wait({run_id: asked_at_s}, TIMEOUT_S)
    return asked, ended


# -- W3: a long run ---------------------------------------------------------------


def w3_long_run(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Runs of a thousand steps, one after the other; the times are those that the log recorded, medians over the runs."""
    _warm_up(lab, sizes.warm_up_runs)
    lab.say("W3: a run of a thousand steps, for warming up")
    lab.wait(dict([lab.request("thousand")]), TIMEOUT_S)
    _settle(lab)
    load = _load()
    seconds, done_ms = [], []
    with lab.meter() as meter:
        for number in range(1, W3_REPEATS + 1):
            lab.say(f"W3: a run of a thousand steps, {number} of {W3_REPEATS}")
            run_id, asked_at_s = lab.request("thousand")
            seconds.append(lab.wait({run_id: asked_at_s}, TIMEOUT_S)[run_id] - asked_at_s)
            with Client(lab.settings) as client:
                done_ms.append([event.at_ms for event in client.events(run_id) if event.type == "StepSucceeded"])
    yield _figure(
        "W3",
        load,
        meter.costs(),
        steps=STEPS_OF_CHAIN,
        repeats=W3_REPEATS,
        seconds=round(statistics.median(seconds), 2),
        steps_per_s=round(STEPS_OF_CHAIN / statistics.median(seconds), 1),
        first_hundred_ms=statistics.median(at[99] - at[0] for at in done_ms),
        last_hundred_ms=statistics.median(at[-1] - at[-100] for at in done_ms),
        slowest_step_ms=max(later - earlier for at in done_ms for earlier, later in itertools.pairwise(at)),
    )


# -- W4: recovery ---------------------------------------------------------------


def w4_recovery(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Runs asked for at a steady pace; in the middle a process is killed, and all have to end, also those asked for after."""
    _warm_up(lab, sizes.warm_up_runs)
    undisturbed = [_paced_with_kill(lab, sizes.w4_runs, None) for _ in range(sizes.w4_repeats)]
    for victim in W4_VICTIMS:
        load = _load()
        with lab.meter() as meter:
            times = []
            for number in range(1, sizes.w4_repeats + 1):
                _settle(lab)
                lab.say(f"W4: kill -9 {victim} among {sizes.w4_runs} runs, {number} of {sizes.w4_repeats}")
                times.append(_paced_with_kill(lab, sizes.w4_runs, victim))
        yield _figure(
            "W4",
            load,
            meter.costs(),
            killed=victim.partition("-")[0],
            runs=sizes.w4_runs,
            repeats=sizes.w4_repeats,
            recovery_s=round(max(times), 2),
            recovery_median_s=round(statistics.median(times), 2),
            undisturbed_s=round(statistics.median(undisturbed), 2),
            log_records=sum(sql.log_ends(lab.broker).values()),
        )


def _paced_with_kill(lab: Lab, runs: int, victim: str | None) -> float:
    """Return the seconds from the kill, or from the moment at which it would have been, to the end of the last run."""
    asked: dict[str, float] = {}
    killed_at_s = 0.0
    for number in range(runs):
        if number == runs // 2:
            killed_at_s = time.monotonic()
            if victim is not None:
                lab.kill(victim)
        run_id, asked_at_s = lab.request("three")
        asked[run_id] = asked_at_s
        time.sleep(W4_PACE_S)
    return max(lab.wait(asked, TIMEOUT_S).values()) - killed_at_s


# -- W5: restart with many live runs ---------------------------------------------------------------


def w5_restart(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """An owner is killed while many runs are alive; others are asked for at once, of every partition, and have to end."""
    _settle(lab)  # after W6 the projection has only just been started
    lab.say(f"W5: {sizes.w5_runs} runs that stay alive")
    before = _count(lab, ALIVE_COUNT)
    lab.request_many("alive", sizes.w5_runs)
    _wait_for(lambda: _count(lab, ALIVE_COUNT) >= before + sizes.w5_runs, "the runs to be alive")
    _settle(lab)
    for victim in ("scheduler-0", "gate-0"):
        load = _load()
        with lab.meter() as meter:
            times = []
            for number in range(1, W5_REPEATS + 1):
                _settle(lab)
                lab.say(f"W5: kill -9 {victim}, {number} of {W5_REPEATS}")
                killed_at_s = time.monotonic()
                lab.kill(victim)
                asked = lab.request_many("three", W5_PROBES)
                times.append(max(lab.wait(asked, TIMEOUT_S).values()) - killed_at_s)
        yield _figure(
            "W5",
            load,
            meter.costs(),
            killed=victim.partition("-")[0],
            live_runs=before + sizes.w5_runs,
            repeats=W5_REPEATS,
            ready_s=round(max(times), 2),
            ready_median_s=round(statistics.median(times), 2),
            log_records=sum(sql.log_ends(lab.broker).values()),
        )


# -- W7: sleeping runs ---------------------------------------------------------------


def w7_sleep(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Runs that sleep, all at the same time: what the scheduler holds of them, how soon another is back after a kill, and how
    late they wake."""
    lab.stop_services()
    lab.start_services(sleepers.SETTINGS)
    _warm_up(lab, sizes.warm_up_runs)
    _settle(lab)
    load = _load()
    with lab.meter() as meter:
        before_mib = meter.resident_mib()["scheduler"]
        before = _count(lab, ASLEEP_COUNT)
        lab.say(f"W7: {sizes.w7_runs} runs fall asleep")
        asked = sleepers.put_to_sleep(lab, sizes.w7_runs)
        _wait_for(lambda: _count(lab, ASLEEP_COUNT) >= before + sizes.w7_runs, "the runs to be asleep")
        time.sleep(W7_REST_S)
        asleep_mib = meter.resident_mib()["scheduler"]
        lab.say("W7: kill -9 scheduler-0")
        killed_at_s = time.monotonic()
        lab.kill("scheduler-0")
        probes = lab.request_many("three", W5_PROBES)
        ready_s = max(lab.wait(probes, TIMEOUT_S).values()) - killed_at_s
        restored_mib = meter.resident_mib()["scheduler"]
        lab.say("W7: they wake")
        lab.wait(asked, W7_TIMEOUT_S)
    late_ms = sleepers.lateness_ms(lab, set(asked))
    yield _figure(
        "W7",
        load,
        meter.costs(),
        runs=sizes.w7_runs,
        scheduler_before_mib=round(before_mib, 1),
        scheduler_asleep_mib=round(asleep_mib, 1),
        scheduler_restored_mib=round(restored_mib, 1),
        ready_s=round(ready_s, 2),
        late_p50_ms=late_ms[len(late_ms) // 2],
        late_p99_ms=late_ms[min(len(late_ms) - 1, len(late_ms) * 99 // 100)],
        late_max_ms=late_ms[-1],
        early=sum(late < 0 for late in late_ms),
    )


# -- memory over many runs ---------------------------------------------------------------


def memory(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Runs of three steps, some thousands at a time; what each process holds after each of these portions."""
    series: dict[str, list[float]] = {}
    done = 0
    load = _load()
    began_s = time.monotonic()
    with lab.meter() as meter:
        while done < sizes.memory_runs:
            portion = min(MEMORY_CHUNK, sizes.memory_runs - done)
            lab.wait(lab.request_many("three", portion), TIMEOUT_S)
            done += portion
            for name, mib in meter.resident_mib().items():
                series.setdefault(name, []).append(mib)
            lab.say(f"memory: {done} of {sizes.memory_runs} runs")
    yield _figure(
        "MEM",
        load,
        meter.costs(),
        runs=done,
        portion=min(MEMORY_CHUNK, sizes.memory_runs),
        seconds=round(time.monotonic() - began_s, 1),
        resident_mib=series,
        growth_mib={name: round(values[-1] - values[len(values) // 2], 1) for name, values in series.items()},
    )


# -- handover ---------------------------------------------------------------


def handover(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Replicas come, are restarted one by one, die and go, while runs are asked for at a steady pace; how long each partition
    of a log had nobody who wrote to it. All runs have to end."""
    for service in ("scheduler", "gate"):
        for action, names in _handovers(lab, service):
            _settle(lab)
            lab.say(f"handover: {action}")
            load = _load()
            ends = sql.log_ends(lab.broker)
            with lab.meter() as meter:
                asked = _paced_while(lab, names)
                ended = lab.wait(asked, TIMEOUT_S)
            gaps = pauses.of_partitions(lab.broker, pauses.LOG_OF[service], ends)
            yield _figure(
                "HO",
                load,
                meter.costs(),
                service=service,
                action=action,
                runs=len(asked),
                **_latencies(asked, ended),
                partitions=len(gaps),
                pause_median_s=round(statistics.median(gaps.values()), 2) if gaps else 0.0,
                pause_max_s=round(max(gaps.values(), default=0.0), 2),
            )
        lab.scale(service, 1)


def _handovers(lab: Lab, service: str) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield what is done, in words, and a function that does it and returns when it is over."""

    def restart_each() -> None:
        for number in range(HANDOVER_REPLICAS):
            _restart(lab, f"{service}-{number}")
            time.sleep(HANDOVER_REST_S)

    yield f"{service}: 1 to {HANDOVER_REPLICAS}", lambda: lab.scale(service, HANDOVER_REPLICAS)
    yield f"{service}: rolling restart of {HANDOVER_REPLICAS}", restart_each
    yield (
        f"{service}: one of {HANDOVER_REPLICAS} killed, not restarted",
        lambda: lab.scale(service, HANDOVER_REPLICAS - 1, kill=True),
    )
    yield f"{service}: {HANDOVER_REPLICAS - 1} to 1", lambda: lab.scale(service, 1)


def _restart(lab: Lab, name: str) -> None:
    before = lab.pid(name)
    lab.terminate(name)
    _wait_for(lambda: lab.pid(name) not in (None, before), f"{name} to be back")


def _paced_while(lab: Lab, act: Callable[[], None]) -> dict[str, float]:
    """Ask for runs at a steady pace before, while and after something is done in another thread; return what was asked for."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, name="handover", daemon=True)
    asked: dict[str, float] = {}
    began_s = time.monotonic()
    over_s: float | None = None
    while over_s is None or time.monotonic() < over_s + HANDOVER_AFTER_S:
        run_id, asked_at_s = lab.request("three")
        asked[run_id] = asked_at_s
        time.sleep(HANDOVER_PACE_S)
        if thread.ident is None:
            if time.monotonic() > began_s + HANDOVER_BEFORE_S:
                thread.start()
        elif over_s is None and not thread.is_alive():
            over_s = time.monotonic()
    if failures:
        raise failures[0]
    return asked


# -- W6: rebuild ---------------------------------------------------------------


def w6_rebuild(lab: Lab, sizes: Sizes) -> Iterable[Figure]:
    """Everything projected anew, from offset 0 into an empty ClickHouse, with nothing else at work but the broker."""
    _fill(lab, sizes.w6_events)
    ends = sql.log_ends(lab.broker)
    sql.wait_caught_up(lab.data_dir, ends, TIMEOUT_S)
    live_events = _count(lab, EVENT_COUNT)
    lab.stop_services()
    folder = lab.data_dir / "rebuild"
    try:
        lab.say(f"W6: a projection of {live_events} events from offset 0")
        load = _load()
        with lab.meter() as meter:
            began_s = time.monotonic()
            lab.start_projection(folder, "bench-rebuild")
            registered_s = time.monotonic()
            caught_up_s = sql.wait_caught_up(folder, ends, TIMEOUT_S)
        events = int(sql.query(folder, EVENT_COUNT)[0]["n"])
    finally:
        lab.stop_services()
        lab.start_services()
    yield _figure(
        "W6",
        load,
        meter.costs(),
        events=events,
        identical_count=events == live_events,
        seconds=round(caught_up_s - registered_s, 2),
        seconds_with_start=round(caught_up_s - began_s, 2),
        events_per_s=round(events / (caught_up_s - registered_s)),
    )


def w6_dataset(lab: Lab, note: Note) -> Iterable[Figure]:
    """What a dataset holds, projected from offset 0 into an empty ClickHouse; then every panel of the dashboards on it.

    The lab has Kafka alone, and the dataset's folder is left as it was but for a consumer group.
    """
    ends = sql.log_ends(lab.broker)
    with tempfile.TemporaryDirectory(prefix="tidegate-rebuild-") as folder:
        lab.say(f"W6: a projection of {note.events:,} events from offset 0")
        load = _load()
        try:
            with lab.meter() as meter:
                began_s = time.monotonic()
                lab.start_projection(Path(folder), f"bench-rebuild-{uuid.uuid4().hex[:8]}")
                registered_s = time.monotonic()
                caught_up_s = sql.wait_caught_up(Path(folder), ends, TIMEOUT_S)
            events = int(sql.query(Path(folder), EVENT_COUNT)[0]["n"])
            lab.say("W6: every panel of the dashboards")
            panels_ms = panel_times_ms(Path(folder), note)
        finally:
            lab.stop_services()
    yield _figure(
        "W6",
        load,
        meter.costs(),
        events=events,
        identical_count=events == note.events,
        seconds=round(caught_up_s - registered_s, 2),
        seconds_with_start=round(caught_up_s - began_s, 2),
        events_per_s=round(events / (caught_up_s - registered_s)),
        events_per_cpu_s=round(events / meter.costs()["projection"].cpu_s),
        panels_ms=panels_ms,
        slowest_panel=max(panels_ms, key=lambda name: panels_ms[name]),
    )


def _fill(lab: Lab, events_wanted: int) -> None:
    """Have runs until the logs are long enough for a rebuild to say something."""
    ends = sql.log_ends(lab.broker)
    sql.wait_caught_up(lab.data_dir, ends, TIMEOUT_S)
    there = _count(lab, EVENT_COUNT)
    runs = (events_wanted - there) // EVENTS_PER_RUN
    if runs > 0:
        lab.say(f"W6: {runs} runs, so that there is something to rebuild")
        lab.wait(lab.request_many("three", runs), TIMEOUT_S)


# -- what they share ---------------------------------------------------------------


def _warm_up(lab: Lab, runs: int, why: str = "") -> None:
    lab.say(f"warming up: {runs} runs{f' ({why})' if why else ''}")
    lab.wait(lab.request_many("three", runs), TIMEOUT_S)


def _settle(lab: Lab) -> None:
    """Wait until the projection has caught up, so that one figure does not pay for another's rows."""
    sql.wait_caught_up(lab.data_dir, sql.log_ends(lab.broker), TIMEOUT_S)


def _count(lab: Lab, text: str) -> int:
    return int(sql.query(lab.data_dir, text)[0]["n"])


def _wait_for(is_there: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_there():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {TIMEOUT_S:.0f} s in vain for {what}")
        time.sleep(ASK_EVERY_S)


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def _latencies(asked: dict[str, float], ended: dict[str, float]) -> dict[str, float]:
    took_ms = sorted((ended[run_id] - asked_at_s) * 1000 for run_id, asked_at_s in asked.items())
    return {
        "p50_ms": round(took_ms[len(took_ms) // 2], 1),
        "p99_ms": round(took_ms[min(len(took_ms) - 1, len(took_ms) * 99 // 100)], 1),
    }


def _figure(work: str, load: float, costs: dict[str, Cost], **values: Any) -> Figure:
    processes = {name: {"cpu_s": cost.cpu_s, "peak_rss_mib": cost.peak_rss_mib} for name, cost in costs.items()}
    return {"work": work, **values, "load_before": load, "processes": processes}


# In the order in which they are done: throughput and latency when the broker's Java is compiled, for which a long run, of many
# small requests, does most; the rebuild when there is much to rebuild; and last the runs that stay alive.
WORKS: Final[dict[str, Callable[[Lab, Sizes], Iterable[Figure]]]] = {
    "W4": w4_recovery,
    "W3": w3_long_run,
    "W1": w1_throughput,
    "W2": w2_one_at_a_time,
    "W6": w6_rebuild,
    "W5": w5_restart,
    "W7": w7_sleep,
    "MEM": memory,
    "HO": handover,
    "SC": scaling,
}
# The others take minutes: only when they are asked for.
STANDARD: Final = ("W4", "W3", "W1", "W2", "W6", "W5")
