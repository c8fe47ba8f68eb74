"""Writes what is generated from the chart and from schemas/topics: `python k8s/render.py`. With `--check` it writes nothing and
exits with 1 if a file is not what it would write.

In this folder: tidegate.yaml and topics-job.yaml are the chart with helm/values-production.yaml, strimzi/tidegate.yaml is what
the chart makes with helm/values-strimzi.yaml, all without what only Helm understands. In the chart: files/topics.yaml is
schemas/topics, as its templates need it, and README.md is made of the comments in values.yaml.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml

from tidegate.topics.access import DEFAULT_PRINCIPAL, ROLES, Principals, grants, strimzi_acls
from tidegate.topics.declaration import load_topics, read_topic_files
from tidegate.topics.settings import TopicsSettings

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts/tidegate"
VALUES = ROOT / "helm/values-production.yaml"
STRIMZI_VALUES = ROOT / "helm/values-strimzi.yaml"
RELEASE = "tidegate"
QUEUE_PLACE: Final = "{queue}"
REPLICA_CONFIGS: Final = frozenset({"min.insync.replicas", "unclean.leader.election.enable"})

HEADER = "# Written by `python k8s/render.py` ({source}). Changes belong there.\n"
HOOK = "helm.sh/hook"
STRIMZI_KINDS: Final = {"KafkaTopic", "KafkaUser"}


def rendered_chart(values: dict[str, Any], release: str = RELEASE) -> list[dict[str, Any]]:
    """Return the objects that Helm would make, hooks included, in a fixed order."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=release, namespace="default")
    texts = (text for name, text in sorted(files.items()) if not name.endswith("NOTES.txt"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def without_helm(document: dict[str, Any]) -> dict[str, Any]:
    """Return the object without the labels and annotations that only mean something to Helm."""
    metadata = dict(document["metadata"])
    metadata["labels"] = {
        name: value
        for name, value in metadata["labels"].items()
        if name not in {"helm.sh/chart", "app.kubernetes.io/managed-by"}
    }
    metadata.pop("annotations", None)
    return document | {"metadata": metadata}


def chart_topics() -> dict[str, Any]:
    """Return the declared topics and the ACLs by role, for the chart: without prefix, `{queue}` where a queue goes."""
    # Constructed so, the settings are the built-in ones, whatever is in this process's environment.
    settings = TopicsSettings.model_construct()
    topics = load_topics([QUEUE_PLACE], settings, read_topic_files(ROOT / "schemas/topics"))
    acls = strimzi_acls(grants(topics, Principals()))
    access = {role: acls.get(DEFAULT_PRINCIPAL.format(role=role), []) for role in ROLES}
    return {
        "topics": [
            {
                "name": topic.name,
                "partitionGroup": topic.file.partition_group,
                "partitions": topic.partition_count,
                "config": {name: value for name, value in topic.config.items() if name not in REPLICA_CONFIGS},
            }
            for topic in topics
        ],
        # The pod of `helm test` is a user, an executor and an operator at once.
        "access": {role: [_flat(acl) for acl in found] for role, found in access.items()}
        | {"test": _united([*access["user"], *access["cli"], *access["executor"]])},
    }


def _flat(acl: dict[str, Any]) -> dict[str, Any]:
    return {**acl["resource"], "operations": acl["operations"]}


def _united(acls: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    united: dict[tuple[str, str], dict[str, Any]] = {}
    for acl in map(_flat, acls):
        there = united.setdefault((acl["type"], acl["name"]), {**acl, "operations": []})
        there["operations"] = sorted({*there["operations"], *acl["operations"]})
    return [united[key] for key in sorted(united)]


def chart_readme() -> str:
    """Return the chart's README: an introduction, and a table of the values with their defaults and comments."""
    introduction = (CHART / "README.md.in").read_text()
    rows = "\n".join(f"| `{path}` | `{default}` | {text} |" for path, default, text in _described_values())
    return introduction.replace("VALUES_TABLE", f"| value | default | meaning |\n| --- | --- | --- |\n{rows}")


def _described_values() -> Iterator[tuple[str, str, str]]:
    """Yield path, default and comment of the leaves of values.yaml, in its order."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    comments: list[str] = []
    path: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if not text:
            comments = []
        elif text.startswith("#"):
            comments.append(text.removeprefix("#").strip())
        elif ":" in text:
            depth = (len(line) - len(line.lstrip())) // 2
            path[depth:] = [text.partition(":")[0]]
            found: Any = defaults
            for key in path:
                found = found[key] if isinstance(found, dict) and key in found else None
            if text.partition(":")[2].strip():  # not only the head of what follows
                shown = yaml.safe_dump(found, default_flow_style=True, width=1000).removesuffix("...\n").strip()
                yield ".".join(path), shown, " ".join(comments).replace("|", "\\|")
                comments = []
            elif depth:
                comments = []


def manifests() -> dict[Path, str]:
    """Return the content of every generated file. Those in the chart come first: the others are made with them."""
    values = yaml.safe_load(VALUES.read_text())
    objects = rendered_chart(values)
    strimzi = rendered_chart(yaml.safe_load(STRIMZI_VALUES.read_text()))
    plain = [document for document in objects if HOOK not in document["metadata"].get("annotations", {})]
    jobs = [document for document in objects if document["kind"] == "Job"]
    chart = "from charts/tidegate and helm/values-production.yaml"
    kafka = [document for document in strimzi if document["kind"] in STRIMZI_KINDS]
    return {
        **chart_files(),
        ROOT / "k8s/tidegate.yaml": _text(chart, map(without_helm, plain)),
        ROOT / "k8s/topics-job.yaml": _text(chart, map(without_helm, jobs)),
        ROOT / "k8s/strimzi/tidegate.yaml": _text(
            "from schemas/topics and helm/values-strimzi.yaml", map(without_helm, kafka)
        ),
    }


def chart_files() -> dict[Path, str]:
    """Return the content of the generated files of the chart."""
    topics = HEADER.format(source="from schemas/topics") + yaml.safe_dump(chart_topics(), sort_keys=False, width=120)
    return {CHART / "files/topics.yaml": topics, CHART / "README.md": chart_readme()}


def _text(source: str, documents: Iterable[dict[str, Any]]) -> str:
    return HEADER.format(source=source) + yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True, width=120)


def drifted() -> list[Path]:
    """Return the generated files that are missing or differ from what would be written."""
    return [path for path, text in manifests().items() if not path.exists() or path.read_text() != text]


def main(arguments: list[str]) -> int:
    """Write the files, or check them; returns the exit code."""
    if arguments == ["--check"]:
        for path in (stale := drifted()):
            sys.stderr.write(f"{path.relative_to(ROOT)} is not up to date: run `python k8s/render.py`\n")
        return 1 if stale else 0
    if arguments:
        sys.stderr.write("usage: render.py [--check]\n")
        return 2
    for generate in (chart_files, manifests):
        for path, text in generate().items():
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
