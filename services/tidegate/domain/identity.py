"""Names that everybody must derive alike: partitions, keys, step ids, idempotency keys."""

from __future__ import annotations

import hashlib
import re
import zlib
from typing import NamedTuple

INSTANCE_ID_PATTERN = r"^[A-Za-z0-9._-]{1,120}$"
RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
ACCOUNT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,7}$"
NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"
MAX_NAME_CHARACTERS = 64  # as the pattern says
MAX_MICROS = 2**53  # of money in one number: beyond it JSON numbers lose precision in many languages
DEFAULT_ACCOUNT = "default"
NAMED_TOOL = "/tool:"  # in the id of a tool call's step, before the tool's name

_run_id = re.compile(RUN_ID_PATTERN)
_account = re.compile(ACCOUNT_PATTERN)
_source = re.compile(r"([A-Za-z0-9._-]{1,249}):(\d{1,9}):(\d{1,18})", re.ASCII)


class Source(NamedTuple):
    """Where a record lies."""

    topic: str
    partition: int
    offset: int


NOWHERE = Source("", -1, -1)


def source_of(text: str) -> Source:
    """Return the place that `topic:partition:offset` names; NOWHERE if it names none. Never raises."""
    found = _source.fullmatch(text)
    return NOWHERE if found is None else Source(found[1], int(found[2]), int(found[3]))


def is_run_id(text: str) -> bool:
    """Tell whether `text` may name a run (letters, digits, dot, dash, underscore; at most 128; no slash or colon)."""
    return _run_id.fullmatch(text) is not None


def is_account(text: str) -> bool:
    """Tell whether `text` may be billed: a slash path of at most eight names."""
    return _account.fullmatch(text) is not None


def partition_of(name: str, partition_count: int) -> int:
    """Return the partition of a run id or an account root: CRC-32 of its UTF-8 bytes modulo the count.

    Every Tidegate process computes it explicitly, because client libraries differ in their default partitioners.
    """
    return zlib.crc32(name.encode()) % partition_count


def account_fits(pattern: str, account: str) -> bool:
    """Tell whether an account is the one of a pattern, or below it; `*` in a pattern is any name in its place."""
    wanted, path = pattern.split("/"), account.split("/")
    return len(wanted) <= len(path) and all(a in ("*", b) for a, b in zip(wanted, path, strict=False))


def account_root(account: str) -> str:
    """Return the first element of an account path: what the gate's partitions are chosen by."""
    return account.partition("/")[0]


def run_id_of_request(topic: str, partition: int, offset: int) -> str:
    """Return the run id of a start request that names none: the same one however often the request is read."""
    return f"{topic}-{partition}-{offset}"


def idempotency_key(run_id: str, step_id: str) -> str:
    """Return the key that is the same for all attempts of a step, and different for any two steps of any two runs."""
    return hashlib.sha256(f"{run_id}\n{step_id}".encode()).hexdigest()[:32]


def visit_path(node_id: str, visit: int) -> str:
    """Return what the step ids of a node begin with in its n-th visit (from 1): only loops lead to a node again."""
    return node_id if visit == 1 else f"{node_id}/{visit}"


def item_path(path: str, number: int) -> str:
    """Return what the step ids of a map's item begin with; `number` counts from 0, `path` is the visit's."""
    return f"{path}/#{number}"


def item_number(step_id: str, path: str) -> int:
    """Return the number of the item that a step of this visit of a map belongs to."""
    return int(step_id[len(path) + 2 :].partition("/")[0])


def child_run_id(run_id: str, step_id: str) -> str:
    """Return the id of the run that does a step: readable as far as there is room, and different for any two steps."""
    return f"{run_id[:80]}.{hashlib.sha256(f'{run_id}{chr(10)}{step_id}'.encode()).hexdigest()[:24]}"


def agent_turn_step(path: str, turn: int) -> str:
    """Return the step id of an agent's n-th plan (from 1); `path` is the visit's, or the item's."""
    return f"{path}/{turn}"


def tool_call_step(plan_step_id: str, tool: str, ordinal: int) -> str:
    """Return the step id of a plan's tool call. `ordinal` counts calls of the same tool in the plan from 1.

    Call ids that models make up are not used: they may be empty or repeated.
    """
    return f"{plan_step_id}{NAMED_TOOL}{tool}" if ordinal == 1 else f"{plan_step_id}{NAMED_TOOL}{tool}#{ordinal}"


def function_in_step(step_id: str) -> str:
    """Return the function that a step's id names itself: of an agent's tool call, or of a flow's call; else empty.

    The ids of all other steps end in the name of their node, in the number of a visit or of a turn, or in `#` and an item's.
    """
    _, slash, last = step_id.rpartition("/")
    if not slash or last.isdecimal() or last.startswith("#"):
        return ""
    return last.removeprefix("tool:").partition("#")[0]


def entry_key(subject: str, first_seq: int, epoch: int) -> str:
    """Return a log record's key. Unique per entry, and per epoch, so that compaction never lets a void entry win."""
    return f"{subject}:{first_seq}:{epoch}"
