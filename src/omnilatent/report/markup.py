"""Pieces of HTML that several sections of the report share. What they are given is markup: escaped already.

- `scrolling_table`: a table in a box that scrolls, so that the page never does.
- `dot`: the coloured mark of a codec.
"""

from __future__ import annotations

from html import escape


def scrolling_table(label: str, head: str, body: str, style: str = "") -> str:
    """A table of header cells `head` and rows `body`; `label` (plain text) is read to those who cannot see it."""
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    table = f'<table class="{style}">' if style else "<table>"
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}, a table that scrolls">'
            f"{table}{thead}<tbody>{body}</tbody></table></div>")


def dot(colour: int | None) -> str:
    """A disc in the codec's colour of the plots; nothing for None."""
    return "" if colour is None else f'<i class="dot" style="--c:var(--s{colour})"></i>'
