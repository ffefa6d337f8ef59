"""What every written page has around its content: one file, the shared style, no network."""

from __future__ import annotations

import importlib.resources
from html import escape


def page(title: str, *body: str, style: str = "") -> str:
    """A whole HTML page.

    Args:
        title: Of the window; escaped here.
        body: Its lines of HTML, names of the user's model escaped.
        style: What goes behind the style sheet that all pages share.
    """
    shared = importlib.resources.files("graphrewrite.report").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{shared}{style}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )
