"""Definitions whose shape is wrong somewhere: what is left of them, so that one report has the other mistakes, too. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jsonschema

from tidegate.domain.graph_changes import edge_ends
from tidegate.domain.strict_schema import shape_problem

Place = tuple[str | int, ...]

MANY: Final = 10_000  # edges that may be missing, where nobody can say how many
_REPAIRS: Final = 6  # one may bring another mistake to light
_GONE: Final = object()
# What is wrong in these ways can be looked at further all the same: only a name or a number is not as it must be.
_HARMLESS: Final = frozenset(
    (
        "pattern",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "minProperties",
        "dependentRequired",
    )
)
_END_OF_PLACE: Final = re.compile(r"[:.\[]|$")
_LONGEST_PLACE: Final = 400


class Unsure(NamedTuple):
    """What is not known of a definition, because its shape is wrong there.

    kinds: nodes and functions, as (part, name), of an unknown kind. names: likewise, what could not be kept. parts: those of
    which nothing could be. edges: how many edges and routes lead nobody knows where. conditions: of such edges, by place.
    gone: places, as problems write them, where something was taken out. fields: by place, what is missing there now.
    """

    kinds: frozenset[tuple[str, str]] = frozenset()
    names: frozenset[tuple[str, str]] = frozenset()
    parts: frozenset[str] = frozenset()
    edges: int = 0
    conditions: Mapping[str, str] = {}
    gone: frozenset[str] = frozenset()
    fields: Mapping[str, frozenset[str]] = {}

    def may_have(self, part: str, name: str) -> bool:
        """Tell whether a part that lacks a name may have it, once its shape is right."""
        return part in self.parts or (part, name) in self.names

    def explains(self, problem: str) -> bool:
        """Tell whether a problem is there only because something was taken out, which is reported itself."""
        return any(
            place in self.gone or any(f"`{field}`" in problem for field in self.fields.get(place, ()))
            for place in places_of(problem)
        )


SURE: Final = Unsure()


def places_of(problem: str) -> Iterator[str]:
    """Yield the places that a problem may be about, the narrowest first: `nodes.a.wait.at`, `nodes.a.wait`, and so on."""
    for end in reversed([found.start() for found in _END_OF_PLACE.finditer(problem[:_LONGEST_PLACE])]):
        yield problem[:end]


def written(place: Iterable[str | int]) -> str:
    """Return a place as problems write it."""
    return ".".join(map(str, place))


def explanation(error: jsonschema.ValidationError) -> str:
    """Return what is wrong with a shape. Of what may be one of several: what is wrong with the one that was surely meant."""
    branches: dict[Any, list[jsonschema.ValidationError]] = {}
    for one in error.context or ():
        branches.setdefault(one.schema_path[0], []).append(one)
    meant = [found for found in branches.values() if not any(_is_another_type(one, error) for one in found)]
    if len(meant) != 1:
        return shape_problem(error)
    inner = meant[0][0]
    where = written(list(inner.absolute_path)[len(error.absolute_path) :])
    return (f"`{where}`: " if where else "") + shape_problem(inner)


def _schema_of(error: jsonschema.ValidationError) -> Any:
    return error.schema


def _is_another_type(inner: jsonschema.ValidationError, error: jsonschema.ValidationError) -> bool:
    return inner.validator in ("type", "enum") and inner.absolute_path == error.absolute_path


def without_damage(definition: Any, validator: Any) -> tuple[dict[str, Any], Unsure] | None:
    """Return a definition without what `validator` finds wrong, and what is not known for that reason.

    None if too little would be left, or too much is there to be looked at.
    """
    if not isinstance(definition, dict):
        return None
    repair = _Repair(definition)
    for _ in range(_REPAIRS):
        errors = [error for error in validator.iter_errors(repair.made) if error.validator not in _HARMLESS]
        if not errors:
            return repair.made, repair.unsure()
        if any(error.validator == "maxProperties" for error in errors):
            return None
        for error in errors:
            repair.mend(error)
        repair.close_holes()
    return None


class _Repair:
    """A copy of a definition, as deep as it has been changed, and what is not known of it any more."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        self.made = dict(definition)
        self._own: set[Place] = {()}
        self._with_holes: dict[int, list[Any]] = {}
        self._kinds: set[tuple[str, str]] = set()
        self._names: set[tuple[str, str]] = set()
        self._parts: set[str] = set()
        self._edges = 0
        self._conditions: dict[str, str] = {}
        self._gone: set[str] = set()
        self._fields: dict[str, set[str]] = {}

    def unsure(self) -> Unsure:
        """Return what is not known any more."""
        return Unsure(
            kinds=frozenset(self._kinds),
            names=frozenset(self._names),
            parts=frozenset(self._parts),
            edges=min(self._edges, MANY),
            conditions=self._conditions,
            gone=frozenset(self._gone),
            fields={place: frozenset(fields) for place, fields in self._fields.items()},
        )

    def mend(self, error: jsonschema.ValidationError) -> None:
        """Take out what an error is about, as little of it as can be."""
        place: Place = tuple(error.absolute_path)
        instance: Any = error.instance
        is_named = len(place) == 2 and place[0] in ("nodes", "functions")
        if error.validator == "additionalProperties":
            for name in instance.keys() - _schema_of(error)["properties"].keys():
                self._remove((*place, name))
        elif not place:  # something that every definition has is not there
            for name in [name for name in _schema_of(error)["required"] if name not in self.made]:
                self.made[name] = self._instead_of(name)
        elif len(place) == 1 and place[0] in ("name", "version", "nodes", "functions"):
            self.made[str(place[0])] = self._instead_of(str(place[0]))
        elif place[0] == "edges" and len(place) == 2:
            self._mend_edge(place, instance)
        elif error.validator == "uniqueItems":
            self._put(place, list(dict.fromkeys(item for item in instance if isinstance(item, str))))
        elif is_named and error.validator == "required":
            self._guess_kind(place)
        elif len(place) == 3 and place[0] in ("nodes", "functions") and place[2] == "kind":
            self._guess_kind(place[:2])
        elif is_named and place[0] == "nodes":
            self._put(place, {})  # it stays, because others name it
            self._guess_kind(place)
            self._gone.add(written(place))
        else:
            self._lose(place)

    def close_holes(self) -> None:
        """Take the holes out of lists; until then their items keep their numbers."""
        for items in self._with_holes.values():
            items[:] = [item for item in items if item is not _GONE]
            self._own = {()}  # their items have other numbers now
        self._with_holes = {}

    # -- kinds of damage ---------------------------------------------------------------

    def _instead_of(self, name: str) -> Any:
        self._parts.add(name)
        return "0" if name in ("name", "version") else {}

    def _guess_kind(self, place: Place) -> None:
        self._kinds.add((str(place[0]), str(place[1])))
        value = self._at(place)
        if isinstance(value, dict):
            value["kind"] = "step"

    def _mend_edge(self, place: Place, edge: Any) -> None:
        """Keep an edge that says where it comes from and leads to, whatever else is wrong with it."""
        is_pair = isinstance(edge, list) and len(edge) == 2
        ends = edge_ends(edge) if is_pair or (isinstance(edge, dict) and {"from", "to"} <= edge.keys()) else ()
        when = edge.get("when") if isinstance(edge, dict) else None
        condition = {"when": when} if when and isinstance(when, str) else {}
        if ends and all(isinstance(end, str) for end in ends):
            self._put(place, {"from": ends[0], "to": ends[1], **condition})
            return
        self._edges += 1
        self._remove(place)
        if condition:
            self._conditions[f"{written(place)}.when"] = condition["when"]

    def _lose(self, place: Place) -> None:
        """Take out a value, and with it whatever may be said because it is not there."""
        if place[0] in ("edges", "start") or "routes" in place:
            self._edges += 1 if isinstance(place[-1], int) else MANY
        if len(place) == 1:
            self._parts.add(str(place[0]))
        elif len(place) == 2:
            self._names.add((str(place[0]), str(place[1])))
        self._gone.add(written(place))
        if len(place) > 2 and isinstance(place[-1], str):
            self._fields.setdefault(written(place[:-1]), set()).add(place[-1])
        self._remove(place)

    # -- how ---------------------------------------------------------------

    def _remove(self, place: Place) -> None:
        around, last = self._at(place[:-1]), place[-1]
        if isinstance(around, dict):
            around.pop(last, None)
        elif isinstance(around, list) and isinstance(last, int) and last < len(around):
            around[last] = _GONE
            self._with_holes[id(around)] = around

    def _put(self, place: Place, value: Any) -> None:
        around = self._at(place[:-1])
        if isinstance(around, dict | list):
            around[place[-1]] = value  # type: ignore[index] # the place is one of its kind
            self._own.add(place)

    def _at(self, place: Place) -> Any:
        """Return what lies at a place, as a copy that may be changed; None if it is gone."""
        value: Any = self.made
        for depth, part in enumerate(place, 1):
            try:
                inner = value[part]
            except (KeyError, IndexError, TypeError):
                return None
            if place[:depth] not in self._own and isinstance(inner, dict | list):
                inner = value[part] = inner.copy()
                self._own.add(place[:depth])
            value = inner
        return value
