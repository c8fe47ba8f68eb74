"""Who is registered and what is offered, as people and programs want to see it. Pure: rows of `instances` in, lists out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tidegate.domain.messages import FunctionDetail, Instance

EXECUTOR: Final = "executor"
SILENT_MS: Final = 10_000  # the usual lease: who has not been heard of for so long has lost its work
MAX_DETAILS_BYTES: Final = 16 * 1024  # of all functions of one executor: every heartbeat repeats them
MAX_DESCRIPTION: Final = 200


def bounded(details: tuple[FunctionDetail, ...]) -> tuple[FunctionDetail, ...]:
    """Return the details, schemas left out where all together would make heartbeats too large; names are always kept."""
    room = MAX_DETAILS_BYTES
    found = []
    for detail in details:
        description = detail.description[:MAX_DESCRIPTION]
        size = len(detail.name.encode()) + len(description.encode()) + len(detail.version)
        with_schema = size + len(detail.schema.encode())
        fits = with_schema <= room
        room -= with_schema if fits else size
        if room < 0:
            found.append(FunctionDetail(name=detail.name, version=detail.version))
        else:
            schema = detail.schema if fits else ""
            found.append(
                FunctionDetail(name=detail.name, version=detail.version, description=description, schema=schema)
            )
    return tuple(found)


def lifecycle(row: Instance, now_ms: int) -> str:
    """Return `registered`, `draining`, `gone` or, for one that said no farewell but is not heard of any more, `silent`."""
    if row.state == "gone":
        return "gone"
    if now_ms - row.at_ms > SILENT_MS:
        return "silent"
    return "draining" if row.state == "draining" else "registered"


def instances(
    rows: Mapping[str, Instance], offsets: Mapping[str, int], now_ms: int, *, everybody: bool = False
) -> list[dict[str, Any]]:
    """Return a line for every process, by service and name; those that are over only if `everybody` is asked for."""
    found = []
    for instance_id, row in rows.items():
        state = lifecycle(row, now_ms)
        if state in ("gone", "silent") and not everybody:
            continue
        found.append(
            {
                "instance_id": instance_id,
                "service": row.service,
                "state": state,
                "incarnation": offsets.get(instance_id, -1) if row.incarnation < 0 else row.incarnation,
                "queue": row.queue,
                "slots": row.slots,
                "free_slots": row.free_slots,
                "running": len(row.running),
                "functions": list(row.functions),
                "host": row.host,
                "pid": row.pid,
                "version": row.version,
                "started_ms": row.started_ms,
                "heard_ms_ago": max(0, now_ms - row.at_ms),
            }
        )
    return sorted(found, key=lambda line: (line["service"], line["instance_id"]))


def functions(rows: Mapping[str, Instance], now_ms: int, *, everybody: bool = False) -> list[dict[str, Any]]:
    """Return a line for every function of every queue and version, with who offers it and how many slots that is.

    state: the best of those of its executors.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for instance_id, row in rows.items():
        state = lifecycle(row, now_ms)
        if row.service != EXECUTOR or (state in ("gone", "silent") and not everybody):
            continue
        details = {detail.name: detail for detail in row.details}
        for label in row.functions:
            detail = details.get(label, FunctionDetail(name=label))
            kind, _, name = label.partition(":")
            line = found.setdefault(
                (row.queue, label, detail.version),
                {
                    "function": name,
                    "kind": kind,
                    "queue": row.queue,
                    "version": detail.version,
                    "state": state,
                    "description": detail.description,
                    "schema": detail.schema,
                    "instances": [],
                    "slots": 0,
                    "free_slots": 0,
                },
            )
            line["instances"].append(instance_id)
            line["state"] = min(line["state"], state, key=_ORDER.index)
            if state == "registered":
                line["slots"] += row.slots
                line["free_slots"] += row.free_slots
    return [found[key] for key in sorted(found)]


_ORDER: Final = ("registered", "draining", "silent", "gone")
