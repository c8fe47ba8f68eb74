"""What a terminal shows of runs. Nothing here asks anybody anything."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tidegate.domain import canonical, states, waits
from tidegate.domain.entry import TAG_FIELD
from tidegate.domain.questions import asks_by
from tidegate.sdk.client import Event, Run
from tidegate.sdk.reading import Approval

MICROS: Final = 1_000_000
DEFAULT_RULE: Final = "default"
_STYLES: Final = {
    states.SUCCEEDED: "green",
    states.FAILED: "red",
    states.REFUSED: "red",
    states.CANCELLED: "yellow",
    states.WAITING: "magenta",
    states.AWAITING_APPROVAL: "magenta",
    states.HELD: "yellow",
}
_NAMED: Final = (
    "kind",
    "event",
    "key",
    "workflow",
    "cause",
    "limit",
    "instance_id",
    "outcome",
    "code",
    "status",
    "conflicts_with",
    "rule",
    "why",
    "by",
)
_TOLD: Final = ("prompt", "payload", "error_message", "reason")

Body = Mapping[str, Any]


# --- small things -------------------------------------------------------------------------------------------------------


def money(micros: int | None) -> str:
    """Return micro-dollars as dollars: all their digits, but at least cents."""
    if micros is None:
        return ""
    whole, part = divmod(abs(micros), MICROS)
    digits = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if micros < 0 else ''}${whole}.{digits}"


def clock(at_ms: int) -> str:
    """Return Unix milliseconds as the time of day here."""
    return f"{time.strftime('%H:%M:%S', time.localtime(at_ms / 1000))}.{at_ms % 1000:03d}"


def moment(at_ms: int) -> str:
    """Return Unix milliseconds as date and time here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))


def _status(status: str) -> Text:
    return Text(status, style=_STYLES.get(status, ""))


def _outcome(status: str) -> Text:
    """Return what a run does, or what became of it."""
    word = {states.CANCELLED: "was ", states.REFUSED: "was ", states.SUCCEEDED: "", states.FAILED: ""}.get(
        status, "is "
    )
    return Text(word).append_text(_status(status))


def question(run_id: str, asked: Body) -> list[str]:
    """Return who asks about what, and how that is answered. A gateway of before names no question and no arguments."""
    lines = [f"    {asks_by(asked['rule'], asked['policy'], asked['why'])}: {asked['reason'] or '-'}"]
    if asked.get("arguments_hash"):
        lines.append(f"    arguments {asked['arguments_hash']}")
    known = asked.get("question", "")
    meant = f"{run_id} {shlex.quote(asked['step_id'])} " + (
        f"--question {known}" if known else f"--attempt {asked['attempt']}"
    )
    if asked["why"] == "outcome_unknown":
        return [*lines, f"    tidegate runs respond {meant} --again   (or --fail, or --done RESULT)"]
    return [*lines, f"    tidegate approvals approve {meant}   (or reject)"]


def _asked(run_id: str, wait: Body) -> list[Text]:
    """Return what a wait waits for, and what can be done about it."""
    lines = [Text(f"  {wait['step_id']} {waited_for(wait)}", style="magenta")]
    if wait["timeout_at_ms"]:
        lines.append(Text(f"    given up {moment(wait['timeout_at_ms'])}"))
    how = {
        waits.ASK: f"respond {run_id} {wait['step_id']} --text …   (or --value JSON)",
        waits.OUTSIDE: f"respond {run_id} {wait['step_id']} --value JSON   (or reject --reason …)",
        waits.EVENT: f"signal {run_id} {wait['event']} --key {wait['key'] or chr(39) * 2} --payload JSON",
    }.get(wait["kind"])
    return [*lines, Text(f"    tidegate runs {how}", style="dim")] if how else lines


def waited_for(wait: Body) -> str:
    """Return what a wait waits for, in words."""
    if wait["kind"] == waits.ASK:
        choices = f" ({', '.join(wait['choices'])})" if wait["choices"] else ""
        return f"asks: {_one_line(wait['prompt'])}{choices}"
    if wait["kind"] == waits.EVENT:
        return f"waits for event {wait['event']}" + (f" with key {wait['key']}" if wait["key"] else "")
    if wait["kind"] == waits.OUTSIDE:
        given = wait["arguments"]  # the live view has a text, which may be cut
        text = given if isinstance(given, str) else canonical.dumps(given)
        return f"waits for an answer of {wait['function']}({_one_line(text)})"
    return f"waits until {moment(wait['due_ms'])}"


def answer(run_id: str, event: Event, asked: Approval | None = None) -> str:
    """Return what came of a command that was not refused. asked: the question that it answered, if it is known."""
    body = event.data
    if event.type == "ApprovalResolved":
        word = {"done": "taken as done", "again": "run again"}.get(
            body.answer, "approved" if body.approved else "rejected"
        )
        about = "" if asked is None else f": {asks_by(asked.rule, asked.policy, asked.why)}"
        said = f"{word}: {body.step_id} (attempt {body.attempt}) of run {run_id}{about}"
        return said + (f", arguments {body.arguments_hash}" if body.arguments_hash else "")
    if event.type == "WaitEnded":
        word = "rejected" if body.outcome == "rejected" else "answered"
        return f"{word}: {body.step_id} of run {run_id}"
    if event.type == "SignalReceived":
        return f"{body.event}: " + (
            f"ends the wait of {body.step_id}" if body.step_id else "kept for what will wait for it"
        )
    word = {"RunPaused": "is paused", "RunResumed": "goes on"}.get(event.type, "is being cancelled")
    return f"run {run_id} {word}"


# --- from the log -------------------------------------------------------------------------------------------------------


def time_line(event: Event, began_ms: int) -> Text:
    """Return an event as a line of a run that began at `began_ms`."""
    line = Text(f"{event.at_ms - began_ms:>7} ms  {event.type:<19} ")
    return line.append_text(Text(describe(event), style=_STYLES.get(getattr(event.data, "status", ""), "")))


def describe(event: Event) -> str:
    """Return what of an event a person wants to see, on one line."""
    body = event.data
    parts = [name] if (name := getattr(body, "step_id", "") or getattr(body, "node_id", "")) else []
    if getattr(body, "visit", 1) > 1:
        parts.append(f"(visit {body.visit})")
    if event.type == "PathsChosen":
        parts.append(f"-> {', '.join(body.targets) or 'nothing'}" + (", back" if body.back_to else ""))
    if event.type == "MapStarted":
        parts.append(f"{len(body.items)} items")
    if event.type in ("ChildStarted", "ChildEnded", "ChildCancelled"):
        parts.append(f"run {body.child_run_id}")
    if getattr(body, "attempt", 0) > 1:
        parts.append(f"(attempt {body.attempt})")
    if event.type == "ApprovalResolved":
        parts.append("approved" if body.approved else "rejected")
    if event.type.startswith("GraphChange"):
        parts.append(", ".join(body.nodes) or "no nodes")
    if event.type == "StepReady":
        parts.append(f"{body.call.function}({_one_line(body.call.arguments)})")
    parts += [f"{name}={value}" for name in _NAMED if (value := getattr(body, name, "")) and value != DEFAULT_RULE]
    if getattr(body, "actual_micros", 0):
        parts.append(money(body.actual_micros))
    parts += [f"- {_one_line(value)}" for name in _TOLD if (value := getattr(body, name, ""))]
    if getattr(body, "output", ""):
        parts.append(f"-> {_one_line(body.output)}")
    return " ".join(parts)


def _one_line(text: str, most: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[:most]}…"


def event_json(event: Event) -> str:
    """Return an event as one line of JSON: `data` has its fields as the log has them, JSON texts unparsed."""
    data = msgspec.to_builtins(event.data)
    data.pop(TAG_FIELD, None)
    return json.dumps({"seq": event.seq, "at_ms": event.at_ms, "type": event.type, "data": data}, ensure_ascii=False)


def run_json(run: Run) -> str:
    """Return a run as one line of JSON."""
    parts = {
        "approvals": [approval._asdict() for approval in run.approvals],
        "waits": [wait._asdict() for wait in run.waits],
    }
    return json.dumps({**run._asdict(), **parts}, ensure_ascii=False)


def ending(run: Run) -> list[Text]:
    """Return how a run stands at last, and what a human can do about it."""
    lines = [Text(f"run {run.run_id} ").append_text(_outcome(run.status)).append(f", {money(run.spent_micros)} spent")]
    if run.code:
        lines[0].append(f": {run.code}: {run.reason}" if run.reason else f": {run.code}")
    if run.status == states.SUCCEEDED:
        lines.append(Text(json.dumps(run.output, ensure_ascii=False, indent=2)))
    for approval in run.approvals:
        arguments = json.dumps(approval.arguments, ensure_ascii=False)
        asked = (
            f"wants {_one_line(arguments)}"
            if approval.why == "change"
            else f"{approval.function}({_one_line(arguments)})"
        )
        lines.append(Text(f"  {approval.step_id} asks: {asked}", style="magenta"))
        lines += map(Text, question(run.run_id, approval._asdict()))
    for wait in run.waits:
        lines += _asked(run.run_id, wait._asdict())
    if run.paused:
        lines.append(Text(f"  it is paused: tidegate runs resume {run.run_id}", style="yellow"))
    return lines


# --- from the live view ---------------------------------------------------------------------------------------------------


def runs_table(rows: Iterable[Body]) -> Table:
    """Return a line for each run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("workflow", overflow="fold")
    table.add_column("account", overflow="fold")
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("spent", justify="right", no_wrap=True)
    table.add_column("started", no_wrap=True)
    table.add_column("why")
    for row in rows:
        told = [f"{row['open_approvals']} to approve"] if row["open_approvals"] else []
        told += [f"{row['open_waits']} open waits"] if row["open_waits"] else []
        told += ["paused"] if row["paused"] else []
        asks = ", ".join(told)
        table.add_row(
            Text(row["run_id"]),
            _status(row["status"]),
            Text(row["workflow"]),
            Text(row["account"]),
            f"{row['succeeded_count']}/{row['step_count']}",
            money(row["spent_micros"]),
            moment(row["started_ms"]) if row["started_ms"] else "",
            Text(_one_line(row["error"] or asks, 60)),
        )
    return table


def run_page(body: Body) -> RenderableType:
    """Return all that the live view knows of a run."""
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(body):
        facts.add_row(Text(name, style="bold"), value)
    parts: list[RenderableType] = [facts]
    if body["steps"]:
        steps = Table(show_edge=False, header_style="bold")
        steps.add_column("step", overflow="fold")
        steps.add_column("status")
        steps.add_column("attempt", justify="right")
        steps.add_column("why", overflow="fold")
        for step in body["steps"]:
            steps.add_row(Text(step["step_id"]), _status(step["status"]), str(step["attempt"]), _step_why(step))
        parts += ["", steps]
        if body["step_count"] > len(body["steps"]):
            parts.append(Text(f"{len(body['steps'])} of {body['step_count']} steps", style="dim"))
    for approval in body["approvals"]:
        parts += ["", *_question(body["run_id"], approval)]
    for wait in body["waits"]:
        parts += ["", *_asked(body["run_id"], wait)]
    return Group(*parts)


def _step_why(step: Body) -> Text:
    """Return why a step waits, or else what its last attempt failed with. A gateway of before says nothing of waiting."""
    waits_for = step.get("waits_for", "")
    if step["status"] == states.HELD and not waits_for:
        return Text("its run, its queue or everything is paused: tidegate pause --list", style="yellow")
    return Text(f"waits: {waits_for}", style="yellow") if waits_for else Text(step["error"])


def _facts(body: Body) -> list[tuple[str, Text]]:
    budget = f" of {money(body['budget_micros'])}" if body["budget_micros"] is not None else ""
    counts = [
        f"{body[f'{kind}_count']} {kind}" for kind in ("succeeded", "failed", "cancelled") if body[f"{kind}_count"]
    ]
    found = [
        ("run", Text(body["run_id"])),
        ("status", _status(body["status"]).append(_beside(body))),
        ("workflow", Text(body["workflow"])),
        ("account", Text(body["account"])),
        ("spent", Text(money(body["spent_micros"]) + budget)),
        ("steps", Text(", ".join([str(body["step_count"]), *counts]))),
        ("started", Text(moment(body["started_ms"]) if body["started_ms"] else "")),
    ]
    if body["finished_ms"]:
        found.append(("finished", Text(f"{moment(body['finished_ms'])} ({_lasted(body)})")))
    if body["output"]:
        found.append(("output", Text(body["output"] + ("…" if body["output_cut"] else ""))))
    if body["code"]:
        found.append(("why", Text(f"{body['code']}: {body['error']}")))
    if body["incomplete"]:
        found.append(("note", Text("earlier events are missing here: sums may be too little", style="yellow")))
    return found


def _beside(body: Body) -> str:
    """Return what a person must know beside the status."""
    paused = ", paused" if body["paused"] and body["status"] not in states.RUN_TERMINAL else ""
    return paused + (", to be cancelled" if _is_ending(body) else "")


def _is_ending(body: Body) -> bool:
    return bool(body["cancel_requested"]) and body["status"] not in states.RUN_TERMINAL


def _lasted(body: Body) -> str:
    return f"{(body['finished_ms'] - body['started_ms']) / 1000:.3f} s"


def _question(run_id: str, approval: Body) -> list[Text]:
    expires_at_ms = approval.get("expires_at_ms", 0)
    until = f", until {moment(expires_at_ms)}" if expires_at_ms else ""
    return [
        Text(f"  {approval['step_id']} asks for approval since {moment(approval['since_ms'])}{until}", style="magenta"),
        *map(Text, question(run_id, approval)),
    ]


def changes(old: Body | None, new: Body) -> list[Text]:
    """Return what is new in a run since it was last looked at, a line each."""
    at = f"{clock(new['updated_ms'])}  "
    lines = []
    before = {step["step_id"]: step for step in old["steps"]} if old else {}
    for step in new["steps"]:
        if step != before.get(step["step_id"]):
            line = Text(f"{at}{step['step_id']}  ").append_text(_status(step["status"]))
            line.append(f" (attempt {step['attempt']})" if step["attempt"] > 1 else "")
            why = _step_why(step)
            lines.append(line.append(" - ").append_text(why) if why else line)
    asked = old["approvals"] if old else []
    for approval in new["approvals"]:
        if approval not in asked:
            lines += _question(new["run_id"], approval)
    waited = [wait["step_id"] for wait in old["waits"]] if old else []
    for wait in new["waits"]:
        if wait["step_id"] not in waited:
            lines += _asked(new["run_id"], wait)
    if old is not None and old["paused"] != new["paused"]:
        lines.append(Text(f"{at}run {new['run_id']} {'is paused' if new['paused'] else 'goes on'}", style="yellow"))
    if _is_ending(new) and not (old and old["cancel_requested"]):
        lines.append(Text(f"{at}cancel was asked for", style="yellow"))
    if old is None or old["status"] != new["status"]:
        lines.append(Text(f"{at}run {new['run_id']} ").append_text(_outcome(new["status"])).append_text(_why(new)))
    return lines


def _why(body: Body) -> Text:
    if body["status"] not in states.RUN_TERMINAL:
        return Text("")
    text = f", {money(body['spent_micros'])} spent"
    if body["code"]:
        text += f": {body['code']}: {body['error']}"
    return Text(text + (f" -> {body['output']}" if body["output"] else ""))
