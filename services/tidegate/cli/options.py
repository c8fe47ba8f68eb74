"""Options that many commands have, with one wording."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; recorded.")]
By = Annotated[str | None, typer.Option("--by", help="Who; recorded. Default: your user name.")]
