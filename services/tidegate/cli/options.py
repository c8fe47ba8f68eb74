"""Options that many commands have, with one wording."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

MAX_PORT: Final = 65_535

Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; recorded.")]
By = Annotated[str | None, typer.Option("--by", help="Who; recorded. Default: your user name.")]


def port_option(help_: str) -> Any:
    """Return the option of a port that something listens on; the help says what 0 means."""
    return typer.Option(min=0, max=MAX_PORT, help=help_)
