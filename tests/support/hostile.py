"""What somebody may write who means harm, or is broken: bytes, wrong records, and right records with impossible values.

Strategies are made from the Avro schemas, so a field that is added later is fuzzed too. `Known` names what is real in the
system under test: values that are half right go deeper than noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

from tidegate import codec
from tidegate.codec.avro import _structs

Headers = tuple[tuple[str, bytes], ...]

SEED = int(os.environ.get("TIDEGATE_HOSTILE_SEED", "0"))
EXAMPLES = os.environ.get("TIDEGATE_HOSTILE_EXAMPLES")

LONGS = (-(2**63), -(2**53), -2, -1, 0, 1, 2, 3, 200, 2**31, 2**51, 2**53, 2**62, 2**63 - 1)
DEEP = "[" * 5_000 + "]" * 5_000
TEXTS = (
    "",
    "\0",
    "a:b/c",
    "../..",
    "ä\u2028\U0001f600",
    "\ufffe",
    "-1",
    "run-requests:0:0",
    "run-requests:-1:99999999999999999999",
    "::",
    "null",
    "{}",
    "1e999",
    '"\\ud800"',
    '{"tool_calls": 3}',
    '{"tool_calls": [{"name": [], "arguments": "\\ud800"}]}',
    DEEP,
    "9" * 5_000,
    "x" * 70_000,
)
# The records that belong to a topic, and some that do not.
RECORDS = {
    "run-requests": ("RunRequest",),
    "run-commands": ("RunCommand",),
    "gate-requests": ("GateRequest",),
    "gate-decisions": ("GateDecision",),
    "step-results": ("StepResult",),
    "step-tasks.default": ("StepTask",),
    "instances": ("Instance",),
    "policies": ("PolicyPublished",),
    "controls": ("Control",),
    "workflows": ("WorkflowPublished",),
    "dead-letters": ("DeadLetter",),
    "schemas": (),
    "run-events": ("RunEntry", "OwnerAnnounced"),
    "gate-ledger": ("LedgerEntry", "OwnerAnnounced"),
}
ALL_RECORDS = tuple(sorted({name for names in RECORDS.values() for name in names}))


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """Run a test on so many examples, the same ones every time; it goes below `@given`.

    TIDEGATE_HOSTILE_EXAMPLES makes it as many as wanted, TIDEGATE_HOSTILE_SEED makes it others. Nothing is shrunk: an example
    takes a whole system, and what fails says what it was fed.
    """
    chosen = settings(
        max_examples=examples if EXAMPLES is None else int(EXAMPLES),
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(chosen(test))


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Values that mean something to the system under test, by `field` or `Record.field`. Other fields get anything."""

    values: Mapping[str, Sequence[Any]]

    def good(self, record: str, field: str, anything: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        """Return real values of a record's field, if there are some."""
        real = self.values.get(f"{record}.{field}", self.values.get(field))
        return anything if real is None else st.sampled_from(real)


@cache
def _schema(name: str) -> Any:
    paths = sorted((codec.schemas_dir() / "avro").glob(f"{name}.v*.avsc"))
    return json.loads(paths[-1].read_text(encoding="utf-8"))


def texts() -> st.SearchStrategy[str]:
    """Return texts that can be written as UTF-8, hostile ones most of all."""
    return st.one_of(st.sampled_from(TEXTS), st.text(st.characters(codec="utf-8"), max_size=20))


@cache
def records(name: str, known: Known) -> st.SearchStrategy[Any]:
    """Return structs of the record's class: the right type, whatever the values."""
    return _of_type(_schema(name), {}, known)


def _of_type(schema: Any, named: dict[str, Any], known: Known) -> st.SearchStrategy[Any]:
    if isinstance(schema, list):
        return st.one_of([_of_type(branch, named, known) for branch in schema])
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "record":
        made = named[schema["name"]] = _record(schema, named, known)
        return made
    if kind == "array":
        return st.lists(_of_type(schema["items"], named, known), max_size=4).map(tuple)
    if kind == "map":
        values = _of_type(schema["values"], named, known)
        return st.dictionaries(
            st.one_of(st.sampled_from(("gate-ledger-0", "run-events-0")), texts()), values, max_size=3
        )
    simple: dict[str, st.SearchStrategy[Any]] = {
        "null": st.none(),
        "boolean": st.booleans(),
        "int": st.sampled_from(LONGS),
        "long": st.one_of(st.sampled_from(LONGS), st.integers(-(2**63), 2**63 - 1)),
        "double": st.sampled_from((0.0, -1.5, float("inf"), float("nan"), 1e308)),
        "string": texts(),
        "bytes": st.one_of(st.binary(max_size=40), st.just(b"\xff" * 300_000)),
    }
    return simple[kind] if kind in simple else named[kind.rpartition(".")[2]]


def _record(schema: Any, named: dict[str, Any], known: Known) -> st.SearchStrategy[Any]:
    """Return records that are as good as can be but for a few fields: those come further than noise."""
    made = _structs()[schema["name"]]
    bad = {field["name"]: _of_type(field["type"], named, known) for field in schema["fields"]}
    good = {name: known.good(schema["name"], name, anything) for name, anything in bad.items()}

    @st.composite
    def record(draw: st.DrawFn) -> Any:
        values = {name: draw(strategy) for name, strategy in good.items()}
        for name in draw(st.lists(st.sampled_from(sorted(bad)), max_size=3)) if bad else ():
            values[name] = draw(bad[name])
        return made(**values)

    return record()


def encoded(name: str, known: Known) -> st.SearchStrategy[bytes]:
    """Return records as bytes."""
    kind = name if name in ("RunEntry", "LedgerEntry") else ""
    return records(name, known).map(lambda record: codec.encode_entry(kind, record) if kind else codec.encode(record))


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Return bytes that were right before they were cut, lengthened or changed in some places."""
    data = bytearray(draw(whole))
    how = draw(st.sampled_from(("cut", "longer", "flip", "flip", "body")))
    if how == "cut":
        return bytes(data[: draw(st.integers(0, max(0, len(data) - 1)))])
    if how == "longer":
        return bytes(data) + draw(st.binary(min_size=1, max_size=9))
    if how == "body":
        return bytes(data[:10]) + draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def _schemas() -> st.SearchStrategy[bytes]:
    """Return Avro schemas under our records' names, with fields of any type."""
    kinds: st.SearchStrategy[Any] = st.recursive(
        st.sampled_from(
            ("long", "string", "bytes", "null", "boolean", "double", "int", "float", "X", {"type": "enum"})
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.builds(lambda items: {"type": "array", "items": items}, inner),
            st.builds(lambda values_: {"type": "map", "values": values_}, inner),
        ),
        max_leaves=5,
    )
    fields = st.lists(st.builds(lambda n, t: {"name": n, "type": t}, st.sampled_from(("run_id", "items", "")), kinds))
    return st.builds(
        lambda name, found: json.dumps(
            {"type": "record", "name": name, "namespace": "tidegate", "fields": found}
        ).encode(),
        st.sampled_from(ALL_RECORDS),
        fields,
    )


def values(topic: str, known: Known) -> st.SearchStrategy[bytes | None]:
    """Return what may lie in a topic: noise, tombstones, damaged records, records that belong elsewhere, and its own."""
    own = st.one_of([encoded(name, known) for name in RECORDS[topic]]) if RECORDS[topic] else _schemas()
    return st.one_of(
        st.binary(max_size=200),
        st.none(),
        damaged(own),
        st.sampled_from(ALL_RECORDS).flatmap(lambda name: encoded(name, known)),
        own,
        own,
        own,
        st.sampled_from(TEXTS).map(str.encode),
    )


def keys() -> st.SearchStrategy[bytes]:
    """Return keys of records; the broker refuses those that are null."""
    return st.one_of(st.sampled_from((b"", b"\xff\xfe", b"k" * 5_000, b"owner:-1:1")), st.binary(max_size=12))


def headers() -> st.SearchStrategy[Headers]:
    """Return headers: ours with nonsense in them, others, many, the same one twice."""
    names = st.sampled_from(("type", "epoch", "incarnation", "", "x", "\0"))
    contents = st.sampled_from((b"", b"OwnerAnnounced", b"-1", b"0", b"9" * 30, b"9" * 5_000, b"\xff", b"x" * 3_000))
    return st.lists(st.tuples(names, contents), max_size=5).map(tuple)


def is_record_of(topic: str, value: bytes) -> bool:
    """Tell whether the bytes decode to a record that belongs into the topic."""
    try:
        record = codec.decode(value)
    except codec.DecodeError:
        return False
    name = type(record).__name__
    return name in RECORDS[topic] or (name == "Entry" and topic in ("run-events", "gate-ledger"))


def as_plain(record: Any) -> Any:
    """Return a record as JSON-like values, for a failure's message."""
    return msgspec.to_builtins(record)
