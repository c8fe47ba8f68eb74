"""Health and metrics of a process: what the endpoint says, and that what is declared can be read."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tidegate import metrics
from tidegate.health import Endpoint, Health, Pulse, served
from tidegate.metrics_use import USES


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - http, by construction
            status, body = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
    return status, json.loads(body) if body.startswith(b"{") else body.decode()


@pytest.mark.feature("O5")
def test_a_process_lives_as_long_as_every_loop_of_it_advances() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    health = Health("scheduler", 30.0, pulse)
    endpoint = Endpoint(health, "127.0.0.1", 0)
    try:
        clock.now_s += 29
        pulse.beat("admission")
        assert get(f"{endpoint.url}/health/live")[0] == 200
        clock.now_s += 2
        status, body = get(f"{endpoint.url}/health/live")
        assert (status, body["stuck"], body["seconds_since"]) == (503, ["loop"], {"loop": 31.0, "admission": 2.0})
        pulse.beat()
        assert get(f"{endpoint.url}/health/live")[0] == 200
    finally:
        endpoint.close()


@pytest.mark.feature("O5")
def test_it_is_ready_when_nothing_is_missing_and_says_what_is() -> None:
    missing = ["partitions to be restored: 1"]
    health = Health("gate", 30.0, Pulse())
    with pytest.raises(SystemExit, match="TIDEGATE_HTTP_PORT"), served(health, "gate-0", "203.0.113.1", 1):
        pass
    endpoint = Endpoint(health, "127.0.0.1", 0)
    try:
        assert get(f"{endpoint.url}/health/ready") == (503, {"service": "gate", "ok": False, "missing": "starting"})
        health.ready_when(lambda: "".join(missing))
        assert get(f"{endpoint.url}/health/ready")[1]["missing"] == missing[0]
        missing.clear()
        assert get(f"{endpoint.url}/health/ready")[0] == 200
        assert get(f"{endpoint.url}/elsewhere")[0] == 404
        families = {family.name: family for family in text_string_to_metric_families(get(f"{endpoint.url}/metrics")[1])}
        assert families["tidegate_ready"].samples[0].value == 1
        assert "tidegate_gate_runs" not in families
        assert "tidegate_gate_open_runs" in families
        assert not any(name.startswith("tidegate_executor_") for name in families), "another service's"
    finally:
        endpoint.close()


@pytest.mark.feature("O5")
def test_names_end_in_their_unit_and_labels_are_few() -> None:
    for one in metrics.DECLARED:
        assert one.name.startswith("tidegate_"), one
        if one.kind == "counter":
            assert one.name.endswith("_total"), one
        if one.kind == "histogram":
            assert re.search(r"_(seconds|messages)$", one.name), one
        assert not {"run_id", "step_id", "account", "function", "workflow"} & set(one.labels), one
    names = [one.name for one in metrics.DECLARED]
    assert len(names) == len(set(names))


def test_every_declared_metric_is_set_somewhere() -> None:
    package = Path(metrics.__file__).parent
    used = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "metrics.py")
    attributes = [name for name, value in vars(metrics).items() if isinstance(value, metrics.MetricWrapperBase)]
    assert [name for name in attributes if f"metrics.{name}" not in used] == []
    assert len(attributes) == len(metrics.DECLARED)


OF_PROMETHEUS = {"le", "pod", "service"}  # of histograms, and what it adds about whom it has asked


@pytest.mark.feature("O5")
def test_every_metric_answers_a_question_and_what_is_asked_can_be() -> None:
    declared = {one.name: one for one in metrics.DECLARED}
    asked: set[str] = set()
    for ask in (ask for asks in USES.values() for ask in asks):
        samples = re.findall(r"tidegate_\w+", ask)
        names = {sample if sample in declared else sample.removesuffix("_bucket") for sample in samples}
        assert names <= declared.keys(), ask
        assert all((declared[name].kind == "histogram") is (f"{name}_bucket" in samples) for name in names), ask
        assert all((declared[name].kind != "gauge") is bool(re.search(rf"{name}\w*\[", ask)) for name in names), ask
        labels = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", ask) for label in labels.split(",")}
        for name in names:
            assert labels <= {*declared[name].labels, *OF_PROMETHEUS}, ask
        assert ask.count("(") == ask.count(")"), ask
        asked |= names
    assert asked == declared.keys(), "each is there for something"


@pytest.mark.feature("O5")
def test_alerts_ask_for_metrics_and_labels_that_there_are() -> None:
    alerts = (Path(metrics.__file__).parents[2] / "charts/tidegate/files/alerts.yaml").read_text(encoding="utf-8")
    declared = {one.name: one for one in metrics.DECLARED}
    asks = re.findall(r"expr: (.+)", alerts)
    assert len(asks) >= 10
    for ask in asks:
        (name,) = re.findall(r"tidegate_\w+", ask)
        used = re.findall(r"(\w+)=\"", ask) + [
            one.strip() for by in re.findall(r"by \(([^)]*)\)", ask) for one in by.split(",")
        ]
        assert set(used) <= {*declared[name].labels, *OF_PROMETHEUS, "namespace"}, ask


def test_labels_that_are_too_many_are_summed_up() -> None:
    values = {f"queue-{number}": 1.0 for number in range(metrics.MAX_LABEL_VALUES + 5)} | {"busy": 7.0}
    gauge = metrics.Gauge("test_bounded", "x", ["queue"], registry=None)
    metrics.set_by_label(gauge, values)
    shown = {sample.labels["queue"]: sample.value for family in gauge.collect() for sample in family.samples}
    assert len(shown) == metrics.MAX_LABEL_VALUES + 1
    assert (shown["busy"], shown["other"]) == (7, 6)
    metrics.set_by_label(gauge, {"busy": 2.0})
    shown = {sample.labels["queue"]: sample.value for family in gauge.collect() for sample in family.samples}
    assert shown == {"busy": 2.0}
    left = {f"budget-{number}": number / 100 for number in range(metrics.MAX_LABEL_VALUES + 5)}
    metrics.set_by_label(gauge, left, keep_least=True)
    shown = {sample.labels["queue"]: sample.value for family in gauge.collect() for sample in family.samples}
    assert (len(shown), shown["budget-0"], shown["other"]) == (51, 0, 0.5)
