"""Documents of the gate: one envelope, many kinds. Pure: text in, checked models or all problems with their lines out.

A document is an object with a `kind` (none means `policy`: so were the first ones written), the name of the document under its
kind's own field, a `version`, and what the kind asks for. Kinds register themselves here; whoever adds one need touch nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidegate.domain import canonical
from tidegate.domain.identity import NAME_PATTERN
from tidegate.yaml_lines import Problem, TextError, line_of, values_of

M = TypeVar("M", bound=BaseModel)

MAX_DOCUMENT_BYTES: Final = 1024 * 1024
DEFAULT_KIND: Final = "policy"
VERSION_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class DocumentError(TextError):
    """Documents are wrong; `problems` lists everything, in the order of lines."""


class Document(BaseModel):
    """What every document has. `KIND` names a kind; `NAME_FIELD` the field that holds a document's name.

    Subclasses register by being defined. What they accept must go on being accepted, for old ones lie in the topic for ever.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    KIND: ClassVar[str] = ""
    NAME_FIELD: ClassVar[str] = ""

    kind: str = ""
    version: str = Field(pattern=VERSION_PATTERN)
    description: str = Field(default="", max_length=4000)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Register the kind. Raises TypeError if there is another of that name."""
        if cls.KIND and _KINDS.setdefault(cls.KIND, cls) is not cls:
            raise TypeError(f"two kinds of documents are named {cls.KIND}")

    @property
    def name(self) -> str:
        """Return the document's name among those of its kind."""
        return str(getattr(self, self.NAME_FIELD))

    @property
    def topic_key(self) -> str:
        """Return its key in the topic. Policies have theirs without a kind, as they always had."""
        return self.name if self.KIND == DEFAULT_KIND else f"{self.KIND}:{self.name}"

    @property
    def label(self) -> str:
        """Return `name@version`, as decisions name it."""
        return f"{self.name}@{self.version}"

    def to_json(self) -> str:
        """Return what is published: canonical JSON without what was not said."""
        return canonical.dumps(self.model_dump(mode="json", exclude_unset=True))

    def misgivings(self) -> list[tuple[tuple[int | str, ...], str]]:
        """Return (path, text) of what an author surely did not mean. Only authors are told: what was published stays good."""
        return []

    @classmethod
    def checked(cls, value: Any) -> Self:
        """Return the document. Raises ValidationError."""
        return cls.model_validate(value)


_KINDS: Final[dict[str, type[Document]]] = {}


def name_field() -> Any:
    """Return how documents, and rules inside them, are named."""
    return Field(pattern=NAME_PATTERN)


def kinds() -> Mapping[str, type[Document]]:
    """Return the kinds that are known: those of the modules that were imported."""
    return _KINDS


def parse(value: Any) -> Document:
    """Check a document that was read from JSON. Raises DocumentError with all problems."""
    try:
        return _model_of(value).checked(value)
    except ValidationError as error:
        raise DocumentError([Problem(0, _said(item)) for item in error.errors()]) from None


def _model_of(value: Any) -> type[Document]:
    if not isinstance(value, dict):
        raise DocumentError([Problem(0, "a document must be an object")])
    kind = value.get("kind", DEFAULT_KIND)
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise DocumentError([Problem(0, f"kind: {kind!r} is none of {', '.join(sorted(_KINDS))}")])
    return model


def read(text: str) -> list[Document]:
    """Check all documents of a YAML or JSON text, several separated by `---`. Raises DocumentError with lines."""
    found: list[Document] = []
    problems: list[Problem] = []
    for value, node in _values(text):
        try:
            document = _model_of(value).checked(value)
            found.append(document)
            problems += [
                Problem(line_of(node, path), f"{'.'.join(map(str, path))}: {text}")
                for path, text in document.misgivings()
            ]
        except DocumentError as error:
            problems += [Problem(line_of(node, ("kind",)), problem.text) for problem in error.problems]
        except ValidationError as error:
            problems += [Problem(line_of(node, item["loc"]), _said(item)) for item in error.errors()]
    keys = [document.topic_key for document in found]
    problems += [Problem(0, f"{key} is there twice") for key in sorted({key for key in keys if keys.count(key) > 1})]
    if not found and not problems:
        problems.append(Problem(0, "there is no document"))
    if problems:
        raise DocumentError(problems)
    return found


def read_as(text: str, model: type[M]) -> M:
    """Check a YAML or JSON text of one value that is no document of the gate. Raises DocumentError with lines."""
    found = list(_values(text))
    if len(found) != 1:
        raise DocumentError([Problem(0, f"it holds {len(found)} documents, not one")])
    ((value, node),) = found
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = {Problem(line_of(node, item["loc"]), _said(item, node)): None for item in error.errors()}
        raise DocumentError(list(problems)) from None


def _values(text: str) -> Iterator[tuple[Any, yaml.Node]]:
    if len(text.encode("utf-8", "replace")) > MAX_DOCUMENT_BYTES:
        raise DocumentError([Problem(0, f"more than {MAX_DOCUMENT_BYTES} bytes")])
    try:
        yield from values_of(text)
    except TextError as error:
        raise DocumentError(error.problems) from None


def _said(item: Any, node: yaml.Node | None = None) -> str:
    """Return a problem for people. node: of the document, to name only what is in it, and what is missing at the end."""
    names = item["loc"] if node is None else _there(node, item["loc"])
    where = ".".join(map(str, names)) or "document"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"


def _there(node: yaml.Node, path: tuple[int | str, ...]) -> Iterator[int | str]:
    """Yield what of a path is in the document, or missing there: pydantic also names branches of unions."""
    for number, part in enumerate(path, 1):
        if isinstance(node, yaml.MappingNode):
            found = next((value for key, value in node.value if getattr(key, "value", None) == str(part)), None)
            if found is not None:
                node = found
            elif number < len(path) or "[" in str(part):
                continue
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            continue
        yield part
