"""Which workflows somebody means, and what is wrong with them: the one place where it is asked, for checking and for publishing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tidegate.domain.workflow import validate_definition
from tidegate.sdk.app import App, default_app
from tidegate.sdk.errors import GraphError
from tidegate.sdk.graph import Graph


class Judged(NamedTuple):
    """Workflows that were looked at. problems: all that is wrong, by `name@version`. definitions: no more than
    the name of a graph that cannot run."""

    definitions: Sequence[Mapping[str, Any]]
    problems: Mapping[str, list[str]]

    def wrong(self) -> list[GraphError]:
        """Return what to say of each that cannot run."""
        return [GraphError(label, problems) for label, problems in self.problems.items() if problems]


Workflows = App | Graph | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Judged


def judged(what: Workflows, located: Callable[[int, str], str] = lambda number, problem: problem) -> Judged:
    """Look at an app's graphs, agents and flows, a graph, or finished definitions; what was looked at already stays as it is.

    located: says where a problem of the n-th definition is. Raises AppError, and GraphError for an agent or a flow that cannot run.
    """
    if isinstance(what, Judged):
        return what
    if isinstance(what, App):
        return _together([*(_of_graph(what, graph) for graph in what.graphs), *((each, []) for each in what.alone())])
    if isinstance(what, Graph):
        return _together([_of_graph(what.app if isinstance(what.app, App) else default_app, what)])
    definitions = [what] if isinstance(what, Mapping) else what
    return _together(
        [(each, [located(number, one) for one in validate_definition(each)]) for number, each in enumerate(definitions)]
    )


def _of_graph(app: App, graph: Graph) -> tuple[Mapping[str, Any], list[str]]:
    """Return a graph's definition, of which there is but the name if the graph cannot run, and what is wrong with it."""
    try:
        return app.definition(graph), []
    except GraphError as error:
        return {"name": graph.name, "version": graph.version}, error.problems


def _together(looked_at: Sequence[tuple[Mapping[str, Any], list[str]]]) -> Judged:
    found: dict[str, list[str]] = {}
    for definition, problems in looked_at:
        label = label_of(definition)
        twice = [f"definition: {label} is there twice"] if label in found else []
        found[label] = [*found.get(label, []), *problems, *twice]
    return Judged([definition for definition, _ in looked_at], found)


def label_of(definition: Mapping[str, Any]) -> str:
    """Return `name@version` of a definition, right or wrong."""
    return f"{definition.get('name')}@{definition.get('version')}"
