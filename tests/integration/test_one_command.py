"""`tidegate demo` and `tidegate dev`, started as a newcomer starts them: one command, real processes, nothing prepared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support.ends import is_gone
from support.stack import eventually

LIMIT_S = 180.0
SHOP = """
from tidegate import App

app = App("shop")

@app.step(cost_micros=100)
def price(order: dict) -> int:
    return sum(line["cents"] for line in order["lines"])

@app.step(retries=2, timeout_s=5)
def label(cents: int) -> str:
    return "large" if cents > 10_000 else "small"

app.graph("classify").chain(price, label)
"""


def tidegate(*words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tidegate.cli", *words],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.feature("K3")
@pytest.mark.feature("D1")
def test_the_demo_kills_and_proves(tmp_path: Path) -> None:
    done = tidegate("demo", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    run_id, seconds = proof.pop("run_id"), proof.pop("seconds")
    assert proof == {
        "ok": True,
        "refund_dispatches": 2,
        "refund_effects": 1,
        "chain_verified": True,
        # Four turns at 3,000, a look-up, two refunds and a letter are set aside; four turns cost 2,000 each.
        "reserved_micros": 4 * 3_000 + 200 + 2 * 500 + 100,
        "settled_micros": 4 * 2_000 + 200 + 500 + 100,
        "money_recomputed": True,
    }
    assert seconds > 0
    assert run_id in done.stderr
    assert "kill -9" in done.stderr
    assert "outcome=lost" in done.stderr
    assert "by-a-plain-producer" in done.stderr


class Dev:
    """A `tidegate dev` that runs, and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def text(self) -> str:
        return self._output.read_text(encoding="utf-8")

    @property
    def bootstrap(self) -> str:
        found = re.search(r"TIDEGATE_KAFKA_BOOTSTRAP=(\S+)", self.text)
        assert found is not None
        return found[1]

    def wait_for(self, text: str) -> None:
        eventually(lambda: self._alive() and text in self.text, f"{text!r} of tidegate dev", LIMIT_S)

    def _alive(self) -> bool:
        assert self.process.poll() is None, self.text
        return True

    def pid_of(self, name: str) -> int:
        found = re.findall(rf"{name}\s+pid (\d+)", self.text)
        return int(found[-1])


@contextmanager
def dev(folder: Path, *words: str) -> Iterator[Dev]:
    """Start `tidegate dev` and end it with Ctrl-C: nothing of it may be left."""
    output = folder / "dev.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidegate.cli", "dev", "--data-dir", str(folder / "data"), *words],
            cwd=folder,
            env={**os.environ, "COLUMNS": "80"},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    started = Dev(process, output)
    try:
        started.wait_for("  tidegate sql")
        yield started
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0, started.text
        # What still makes Kafka's start-up cache is killed by the kernel when its parent is gone, which it may be a moment earlier.
        eventually(lambda: all(map(is_gone, children)), "all of it to be gone")
    finally:
        process.kill()
        process.wait()


@pytest.mark.feature("O4")
def test_dev_runs_an_app_of_ones_own_keeps_its_data_and_forgets_it_when_told(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP, encoding="utf-8")
    ports = ("--kafka-port", "0")
    order = json.dumps({"lines": [{"cents": 900}, {"cents": 12_000}]})
    with dev(tmp_path, "--app", "shop.py:app", *ports) as running:
        place = {"TIDEGATE_KAFKA_BOOTSTRAP": running.bootstrap, "TIDEGATE_DATA_DIR": str(tmp_path / "data")}
        done = tidegate(
            "runs", "start", "classify", "--input", order, "--run-id", "one", "--wait", folder=tmp_path, **place
        )
        assert done.returncode == 0, done.stderr
        assert '"large"' in done.stdout
        for service in ("scheduler-0", "executor-default-0"):
            os.kill(running.pid_of(service), signal.SIGKILL)
        running.wait_for("started again 1 time")
        done = tidegate(
            "runs", "start", "classify", "--input", order, "--run-id", "two", "--wait", folder=tmp_path, **place
        )
        assert done.returncode == 0, done.stderr
        verified = json.loads(tidegate("verify", "--json", folder=tmp_path, **place).stdout)
        assert verified["ok"]
        assert verified["runs_not_over"] == 0
        assert "is taken" not in running.text  # 0 asks for any port
        for word in ([], ["--fresh"]):
            second = tidegate("dev", *word, folder=tmp_path, **place)
            assert second.returncode == (2 if word else 1)
            assert "is in use by a Tidegate that runs" in second.stderr
        assert tidegate("runs", "show", "two", folder=tmp_path, **place).returncode == 0
    with dev(tmp_path, "--app", "shop.py:app", *ports) as running:
        place = {"TIDEGATE_KAFKA_BOOTSTRAP": running.bootstrap, "TIDEGATE_DATA_DIR": str(tmp_path / "data")}
        query = ("sql", "SELECT run_id, status FROM runs ORDER BY run_id", "-f", "TSV")
        rows = "one\tsucceeded\ntwo\tsucceeded\n"
        eventually(lambda: tidegate(*query, folder=tmp_path, **place).stdout == rows, "rows of both runs")
        shown = tidegate("runs", "show", "one", "--json", folder=tmp_path, **place)
        assert json.loads(shown.stdout)["status"] == "succeeded"
    with dev(tmp_path, "--app", "shop.py:app", "--fresh", *ports) as running:
        place = {"TIDEGATE_KAFKA_BOOTSTRAP": running.bootstrap, "TIDEGATE_DATA_DIR": str(tmp_path / "data")}
        assert tidegate("sql", "SELECT count() FROM runs", "-f", "TSV", folder=tmp_path, **place).stdout == "0\n"


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("from tidegate import App\nprint(undefined)\n", 1, "name 'undefined' is not defined"),
        ("shop = 1\n", 2, "no App named 'app'"),
        (None, 2, "there is no file broken.py"),
    ],
)
def test_dev_says_what_is_wrong_with_an_app_and_starts_nothing(
    tmp_path: Path, source: str | None, code: int, said: str
) -> None:
    if source is not None:
        (tmp_path / "broken.py").write_text(source, encoding="utf-8")
    done = tidegate("dev", "--app", "broken.py:app", "--data-dir", str(tmp_path / "data"), folder=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.feature("P3")
def test_the_throttling_demo_never_exceeds_its_limit(tmp_path: Path) -> None:
    done = tidegate("demo", "throttling-100", "--runs", "40", "--json", folder=tmp_path, TIDEGATE_DEMO_CALL_S="0.05")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert (proof["ok"], proof["runs"], proof["calls"], proof["problems"]) == (True, 40, 40, [])
    assert 0 < proof["most_at_once"] <= proof["limit"] == 5
    assert "THROTTLED" in done.stderr


@pytest.mark.feature("K3")
@pytest.mark.feature("P2")
def test_the_budget_demo_denies_asks_and_waits_and_the_money_agrees(tmp_path: Path) -> None:
    done = tidegate("demo", "budget", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert (proof["ok"], proof["problems"]) == (True, [])
    assert proof["ended"] == {"acme/sales": "failed", "acme/support": "succeeded", "acme/ops": "succeeded"}
    teams = {"acme/sales": 30_000, "acme/support": 40_000, "acme/ops": 40_000}
    assert proof["spent_micros"] == {"acme": 110_000, **teams}
    assert [word for word in ("DENIED", "ASKED", "PAUSED", "TOPPED UP") if word not in done.stderr] == []
