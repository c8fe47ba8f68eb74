"""What a terminal is given: text of others is shown, and never obeyed.

Run ids, reasons, prompts, messages of errors and outputs are written by whoever asks for runs, by models and by what they read. A
terminal takes some characters for orders: to clear the page, to move the cursor up and write over what stands there, or to show
text in another order. Who is asked to approve something must see what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import rich.console
import typer
from rich.segment import Segment
from rich.text import Text

# Control characters but tab and line feed, those that change the direction of writing, and halves of surrogate pairs.
_ORDERS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Return a text with everything that steers a terminal written out: `\\x1b[2J`."""
    return _ORDERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, *, err: bool = False) -> None:
    """Print somebody's text, and a line feed."""
    typer.echo(harmless(text), err=err)


class Console(rich.console.Console):
    """A console that shows all texts harmless; what it adds itself (styles, cursor movements) it may."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Yield what is shown of something."""
        # Texts before they are laid out: what is written out takes room, and must not push the rest out of its column.
        shown = _written_out(renderable) if isinstance(renderable, Text) else renderable
        for segment in super().render(shown, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text with its markup as it is shown."""
        return super().render_str(harmless(text), **options)


def _written_out(text: Text) -> Text:
    """Return the text, harmless, in its styles."""
    borders = [border for found in _ORDERS.finditer(text.plain) for border in found.span()]
    if not borders:
        return text
    shown = text.blank_copy()
    for part in text.divide(borders):
        shown.append_text(Text(harmless(part.plain)) if _ORDERS.fullmatch(part.plain) else part)
    return shown
