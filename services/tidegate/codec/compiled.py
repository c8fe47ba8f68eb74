"""Avro bodies written and read by functions made for one schema each, as `dataclasses` makes an `__init__` for one class.

Why not fastavro for this too: it walks the schema anew for every record and needs dicts on both sides. For a log entry of
two events (550 bytes) it took 38 us to write and 17 us to read; these functions take 7 us and 11 us. fastavro still says
what a schema means (parsing, canonical form, fingerprint), and `tests/unit/test_codec.py` holds every function made here
against it. What fastavro offers and we do not use (enums, fixed, recursion, logical types) is refused when it is met.

The made source contains nothing of a schema but numbers and quoted names, so a hostile schema cannot say what is executed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

Schema = Any  # a parsed Avro schema: a name, a list (union) or a dict
Classes = Mapping[str, type[msgspec.Struct]]
Encoder = Callable[[Any], bytes]  # of a struct
Decoder = Callable[[Any], Any]  # of bytes

SHORT: Final = 8192  # numbers from 0 up to here, and lengths, are written by looking them up
_PAIRS: Final = 1 << 14
_TWO_PAIRS: Final = 1 << 28
_THREE_PAIRS: Final = 1 << 42
MAX_NAMES: Final = 5_000  # in the source of one function; our largest schema needs a twentieth of them
_DOUBLE: Final = struct.Struct("<d")
_PRIMITIVES: Final = frozenset(("null", "boolean", "int", "long", "double", "string", "bytes"))

# Two groups of seven bits as they end a varint, and as they stand in the middle of one.
_LAST: Final = tuple([bytes((n,)) if n < 128 else bytes((n & 127 | 128, n >> 7)) for n in range(_PAIRS)])
_MIDDLE: Final = tuple([bytes((n & 127 | 128, n >> 7 | 128)) for n in range(_PAIRS)])
_SHORT: Final = _LAST[: 2 * SHORT : 2]


class UnsupportedSchemaError(ValueError):
    """The schema uses something of Avro that records of Tidegate do not."""


# --- what the made functions call ---------------------------------------------------------------------------------------


def write_long(number: int) -> bytes:
    """Return the zigzag varint of a 64-bit number. Raises OverflowError beyond that."""
    zigzag = number << 1 if number >= 0 else ~(number << 1)
    if zigzag < _PAIRS:
        return _LAST[zigzag]
    if zigzag < _TWO_PAIRS:  # offsets
        return _MIDDLE[zigzag & 0x3FFF] + _LAST[zigzag >> 14]
    if zigzag < _THREE_PAIRS:  # times
        return _MIDDLE[zigzag & 0x3FFF] + _MIDDLE[zigzag >> 14 & 0x3FFF] + _LAST[zigzag >> 28]
    if zigzag >> 64:
        raise OverflowError(f"{number} does not fit into 64 bits")
    out = _MIDDLE[zigzag & 0x3FFF]
    zigzag >>= 14
    while zigzag >= _PAIRS:
        out += _MIDDLE[zigzag & 0x3FFF]
        zigzag >>= 14
    return out + _LAST[zigzag]


def read_long(data: bytes, at: int, first: int) -> tuple[int, int]:
    """Return a number of more than one byte, and where it ends; `first` is the byte before `at`."""
    byte = data[at]
    if byte < 128:  # two bytes, as most have that have more than one
        number = first & 127 | byte << 7
        return number >> 1 ^ -(number & 1), at + 1
    number = first & 127 | (byte & 127) << 7
    at += 1
    shift = 14
    while (byte := data[at]) > 127:
        if shift > 56:
            raise ValueError("a number of more than 64 bits")
        number |= (byte & 127) << shift
        shift += 7
        at += 1
    number |= byte << shift
    if shift > 56 and number >> 64:
        raise ValueError("a number of more than 64 bits")
    return number >> 1 ^ -(number & 1), at + 1


def read_length(data: bytes, at: int, first: int) -> tuple[int, int]:
    """Return a length of more than one byte, and where it ends. Raises ValueError if it is negative."""
    length, at = read_long(data, at, first) if first & 128 else (-1, at)
    if length < 0:
        raise ValueError("a negative length")
    return length, at


def read_count(data: bytes, at: int, first: int) -> tuple[int, int]:
    """Return how many items a block has. A negative count is followed by the block's size in bytes, which is not needed."""
    count, at = read_long(data, at, first) if first & 128 else (first >> 1 ^ -(first & 1), at)
    if count < 0:
        count = -count
        size = data[at]
        at += 1
        if size & 128:
            _, at = read_long(data, at, size)
    if count > len(data):  # every item takes a byte at least
        raise ValueError("a block of more items than there are bytes")
    return count, at


_HELPERS: Final[dict[str, Any]] = {
    "SHORT": _SHORT,
    "write_long": write_long,
    "read_long": read_long,
    "read_length": read_length,
    "read_count": read_count,
    "pack": _DOUBLE.pack,
    "unpack": _DOUBLE.unpack_from,
}


class _Maker:
    """What the making of one function needs: fresh names, the types that the schema named so far, the objects it refers to."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.objects: dict[str, Any] = dict(_HELPERS)
        self._named: dict[str, Schema] = {}
        self._count = 0

    def name(self) -> str:
        self._count += 1
        if (
            self._count > MAX_NAMES
        ):  # a type that is named twice is made twice, and what it names again twice: 2, 4, 8, ...
            raise UnsupportedSchemaError("the schema is too large")
        return f"v{self._count}"

    def keep(self, value: Any) -> str:
        """Return a name by which the made source can refer to an object."""
        name = self.name()
        self.objects[name] = value
        return name

    def resolve(self, schema: Schema) -> Schema:
        """Return the definition of a type: a primitive's name, a list of branches, or a dict that is no primitive."""
        if isinstance(schema, dict):
            if schema["type"] in _PRIMITIVES:
                return schema["type"]
            if schema["type"] == "record":
                self._named[schema["name"]] = schema
            return schema
        if isinstance(schema, str) and schema not in _PRIMITIVES:
            return self._named[schema]
        return schema

    def make(self, lines: list[str]) -> Any:
        """Compile the lines as a function's body or definition and return what they call `made`."""
        source = "\n".join(lines)
        exec(compile(source, "<tidegate avro>", "exec"), self.objects)  # noqa: S102 - see the module's docstring
        return self.objects.pop("made")


def short_name(schema: Schema) -> str:
    """Return a record's name without its name space."""
    name: str = schema["name"]
    return name.rpartition(".")[2]


def _indented(lines: list[str]) -> list[str]:
    return [f" {line}" for line in lines]


def _takes_bytes(maker: _Maker, schema: Schema) -> bool:
    """Tell whether every value of the type takes a byte at least: all do but records that hold nothing."""
    schema = maker.resolve(schema)
    is_record = isinstance(schema, dict) and schema["type"] == "record"
    return not is_record or any(_takes_bytes(maker, field["type"]) for field in schema["fields"])


def _split_null(schema: list[Schema]) -> tuple[Schema, int] | None:
    """Return the other branch of a union of null and one thing, and its index; None for other unions."""
    if len(schema) == 2 and "null" in schema:
        index = 1 - schema.index("null")
        return schema[index], index
    return None


# --- writing ------------------------------------------------------------------------------------------------------------


def make_encoder(schema: Schema, classes: Classes, header: bytes) -> Encoder:
    """Return a function that writes a struct of the schema's class, after `header`.

    The function raises AttributeError, KeyError, OverflowError, TypeError or UnicodeEncodeError on values that do not fit.
    """
    return _record_encoder(_Maker(classes), schema, header)


def _record_encoder(maker: _Maker, schema: Schema, prefix: bytes) -> Encoder:
    before: list[str] = []
    parts = [repr(prefix), *_record_parts(maker, maker.resolve(schema), "x", before)]
    encoder: Encoder = maker.make(["def made(x):", *_indented(before), f" return b''.join(({', '.join(parts)},))"])
    return encoder


def make_piecewise_encoder(
    schema: Schema, classes: Classes, header: bytes, field: str
) -> tuple[Callable[[Any, bytes], bytes], Encoder]:
    """Return two functions that write a struct of the schema's class together, piece by piece.

    The first writes all but the array `field`, which must be the last one, and takes that one's blocks as bytes. The second
    writes one block of the array, of a sequence that is not empty; an array may have any number of blocks. Both raise what the
    function of `make_encoder` does.
    """
    maker = _Maker(classes)
    schema = maker.resolve(schema)
    *others, last = schema["fields"]
    array = maker.resolve(last["type"])
    if last["name"] != field or not isinstance(array, dict) or array["type"] != "array":
        raise UnsupportedSchemaError(f"{short_name(schema)} does not end with an array {field!r}")
    before: list[str] = []
    parts = [repr(header), *_record_parts(maker, {**schema, "fields": others}, "x", before), "blocks", "b'\\0'"]
    made = maker.make(["def made(x, blocks):", *_indented(before), f" return b''.join(({', '.join(parts)},))"])
    return made, _blocks_encoder(maker, array, end=b"")


def _record_parts(maker: _Maker, schema: Schema, value: str, before: list[str]) -> list[str]:
    known = maker.classes[short_name(schema)].__struct_fields__
    parts = []
    for field in schema["fields"]:
        if field["name"] not in known:
            raise UnsupportedSchemaError(f"{schema['name']} has no field {field['name']!r}")
        parts += _parts(maker, field["type"], f"{value}.{field['name']}", before)
    return parts


def _parts(maker: _Maker, schema: Schema, value: str, before: list[str]) -> list[str]:
    """Return the expressions, in order, whose bytes joined are the value's; `before` takes statements to run first."""
    schema = maker.resolve(schema)
    name = maker.name()
    if schema in ("string", "bytes"):
        length = maker.name()
        taken = f"{value}.encode()" if schema == "string" else value
        size = f"({length} := len({name} := {taken}))"
        return [f"(SHORT[{length}] if {size} < {SHORT} else write_long({length}))", name]
    if schema in ("int", "long"):
        return [f"(SHORT[{name}] if 0 <= ({name} := {value}) < {SHORT} else write_long({name}))"]
    if schema == "boolean":
        return [f"(b'\\1' if {value} else b'\\0')"]
    if schema == "double":
        return [f"pack({value})"]
    if isinstance(schema, list):
        return [_union_part(maker, schema, value)]
    if not isinstance(schema, dict):
        raise UnsupportedSchemaError(f"type {schema!r}")
    if schema["type"] == "record":
        before.append(f"{name} = {value}")
        return _record_parts(maker, schema, name, before)
    blocks = maker.keep(_blocks_encoder(maker, schema))
    return [f"({blocks}({name}) if ({name} := {value}) else b'\\0')"]


def _blocks_encoder(maker: _Maker, schema: Schema, end: bytes = b"\0") -> Encoder:
    """Return a function for a map or an array that is not empty: one block, and what says that there is no other."""
    before: list[str] = []
    if schema["type"] == "map":
        parts = [*_parts(maker, "string", "k", before), *_parts(maker, schema["values"], "v", before)]
        loop = "for k, v in x.items():"
    elif schema["type"] == "array":
        parts, loop = _parts(maker, schema["items"], "v", before), "for v in x:"
    else:
        raise UnsupportedSchemaError(f"type {schema['type']!r}")
    step = _indented(_indented([*before, f"out += ({', '.join(parts)},)"]))
    made: Encoder = maker.make(
        [
            "def made(x):",
            " n = len(x)",
            f" out = [SHORT[n] if n < {SHORT} else write_long(n)]",
            f" {loop}",
            *step,
            f" out.append({end!r})",
            " return b''.join(out)",
        ]
    )
    return made


def _union_part(maker: _Maker, schema: list[Schema], value: str) -> str:
    name = maker.name()
    optional = _split_null(schema)
    if optional is not None:
        before: list[str] = []
        branch, index = optional
        parts = [repr(_SHORT[index]), *_parts(maker, branch, "x", before)]
        joined = f" return b''.join(({', '.join(parts)},))"
        present = maker.keep(maker.make(["def made(x):", *_indented(before), joined]))
        return f"({_SHORT[1 - index]!r} if ({name} := {value}) is None else {present}({name}))"
    branches: dict[type[msgspec.Struct], Encoder] = {}
    for index, branch in enumerate(schema):
        record = maker.resolve(branch)
        if not isinstance(record, dict) or record["type"] != "record":
            raise UnsupportedSchemaError("a union of something else than records, or of null and one thing")
        branches[maker.classes[short_name(record)]] = _record_encoder(maker, record, _SHORT[index])
    return f"{maker.keep(branches)}[type({name} := {value})]({name})"


# --- reading ------------------------------------------------------------------------------------------------------------


def make_decoder(
    schema: Schema, classes: Classes, start: int, *, raw: bool, without: frozenset[str] = frozenset()
) -> Decoder:
    """Return a function that reads a whole record whose body begins at `start`, into structs or, if `raw`, into dicts.

    without: fields of the record that are passed over; only if `raw`.

    Fields that the class does not have are skipped; those that the schema does not have get the class's default. Raw
    values are as the writer's schema has them; items of unions of records are (name, fields).
    The function raises IndexError, TypeError, UnicodeDecodeError, ValueError or `struct.error` on broken bytes.
    """
    reader = _Reader(_Maker(classes), raw=raw)
    lines = reader.lines(schema, "x", without)
    check = [f"if p != len(d): raise ValueError('the body ends at byte %d of %d' % (p - {start}, len(d) - {start}))"]
    decoder: Decoder = reader.maker.make(
        ["def made(d):", f" p = {start}", *_indented(lines), *_indented(check), " return x"]
    )
    return decoder


class _Reader:
    """Makes the lines that read a value: `d` is the data, `p` the position, `n` a byte, then what it means."""

    def __init__(self, maker: _Maker, *, raw: bool) -> None:
        self.maker = maker
        self._raw = raw

    def lines(self, schema: Schema, to: str, without: frozenset[str] = frozenset()) -> list[str]:
        """Return statements that read a value into the variable `to` and move `p` behind it."""
        schema = self.maker.resolve(schema)
        if schema in ("string", "bytes"):
            empty, decoded = ("''", ".decode()") if schema == "string" else ("b''", "")
            return [
                "n = d[p]; p += 1",
                f"if not n: {to} = {empty}",  # as many are
                f"elif n & 129: n, q = read_length(d, p, n); p = q + n; {to} = d[q:p]{decoded}",
                f"else: q = p; p += n >> 1; {to} = d[q:p]{decoded}",
            ]
        if schema in ("int", "long"):
            return _number("read_long", to, 128, "n >> 1 ^ -(n & 1)")
        if schema == "boolean":
            return [
                "n = d[p]; p += 1",
                "if n > 1: raise ValueError('a boolean that is neither 0 nor 1')",
                f"{to} = n == 1",
            ]
        if schema == "double":
            return [f"{to}, = unpack(d, p); p += 8"]
        if isinstance(schema, list):
            return self._union(schema, to)
        if not isinstance(schema, dict):
            raise UnsupportedSchemaError(f"type {schema!r}")
        if schema["type"] == "record":
            return self._record(schema, to, without)
        return self._blocks(schema, to)

    def _passing(self, schema: Schema) -> list[str]:
        """Return statements that move `p` behind a value and make nothing of it."""
        schema = self.maker.resolve(schema)
        if schema in ("string", "bytes"):
            return ["n = d[p]; p += 1", "if n & 129: n, p = read_length(d, p, n); p += n", "else: p += n >> 1"]
        if schema in ("int", "long"):
            return ["while d[p] > 127: p += 1", "p += 1"]
        if isinstance(schema, dict) and schema["type"] == "map":
            item = [*self._passing("string"), *self._passing(schema["values"])]
            return ["while d[p]:", *_indented(_count()), " for _ in range(n):", *_indented(_indented(item)), "p += 1"]
        return self.lines(schema, self.maker.name())

    def _record(self, schema: Schema, to: str, without: frozenset[str] = frozenset()) -> list[str]:
        made = None if self._raw else self.maker.classes.get(short_name(schema))
        if made is None and not self._raw:
            _Reader(self.maker, raw=True).lines(schema, to)  # for the types that it names
            return [f"raise ValueError({short_name(schema) + ' is a record that this version does not know'!r})"]
        lines, arguments = [], []
        for field in schema["fields"]:
            if field["name"] in without:
                lines += self._passing(field["type"])
                continue
            name = self.maker.name()
            if made is None:
                arguments.append(f"{field['name']!r}: {name}")
            elif field["name"] in made.__struct_fields__:
                arguments.append(f"{field['name']}={name}")
            else:
                lines += _Reader(self.maker, raw=True).lines(field["type"], name)
                continue
            lines += self.lines(field["type"], name)
        joined = ", ".join(arguments)
        return [*lines, f"{to} = {{{joined}}}" if made is None else f"{to} = {self.maker.keep(made)}({joined})"]

    def _blocks(self, schema: Schema, to: str) -> list[str]:
        key, value = self.maker.name(), self.maker.name()
        if schema["type"] == "map":
            item = [*self.lines("string", key), *self.lines(schema["values"], value), f"{to}[{key}] = {value}"]
            first, last = f"{to} = {{}}", "p += 1"
        elif schema["type"] == "array":
            if not _takes_bytes(self.maker, schema["items"]):
                raise UnsupportedSchemaError(
                    "an array of items without bytes: a few bytes could stand for any number of them"
                )
            item = [*self.lines(schema["items"], value), f"{to}.append({value})"]
            first, last = f"{to} = []", "p += 1" if self._raw else f"p += 1; {to} = tuple({to})"
        else:
            raise UnsupportedSchemaError(f"type {schema['type']!r}")
        return [
            first,
            "while d[p]:",
            *_indented(_count()),
            " for _ in range(n):",
            *_indented(_indented(item)),
            last,
        ]

    def _union(self, schema: list[Schema], to: str) -> list[str]:
        optional = _split_null(schema)
        if optional is not None:
            branch, index = optional
            there = [f"if n != {2 * index}: raise ValueError('no such branch')", *self.lines(branch, to)]
            return ["n = d[p]; p += 1", f"if n == {2 - 2 * index}: {to} = None", "else:", *_indented(there)]
        branches = self.maker.keep([self._branch(branch) for branch in schema])
        return [
            "n = d[p]; p += 1",
            "if n & 129: raise ValueError('no such branch')",
            f"{to}, p = {branches}[n >> 1](d, p)",
        ]

    def _branch(self, schema: Schema) -> Callable[[bytes, int], tuple[Any, int]]:
        record = self.maker.resolve(schema)
        if not isinstance(record, dict) or record["type"] != "record":
            raise UnsupportedSchemaError("a union of something else than records, or of null and one thing")
        result = f"({short_name(record)!r}, x)" if self._raw else "x"
        made: Callable[[bytes, int], tuple[Any, int]] = self.maker.make(
            ["def made(d, p):", *_indented(self.lines(record, "x")), f" return {result}, p"]
        )
        return made


def _count() -> list[str]:
    """Return statements that make `n` the number of items of a block."""
    return _number("read_count", "n", 129, "n >> 1")


def _number(reader: str, to: str, mask: int, short: str) -> list[str]:
    """Return statements that read a number: by `reader` if its first byte has a bit of `mask`, else by `short`."""
    return ["n = d[p]; p += 1", f"if n & {mask}: {to}, p = {reader}(d, p, n)", f"else: {to} = {short}"]
