"""The package's docstrings as the site shows them: references as links, examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ANN401 - griffe's interface
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
    """Replace Sphinx roles by links that may stay unresolved, and name the section of examples as the parser does.

    Returns:
        The docstring.

    Example:
        >>> rewrite("See :class:`~package.Thing`.")
        'See <autoref identifier="package.Thing" optional><code>Thing</code></autoref>.'
    """

    def link(match: re.Match[str]) -> str:
        shown = match[2].rsplit(".", 1)[-1] if match[1] else match[2]
        return f'<autoref identifier="{match[2]}" optional><code>{shown}</code></autoref>'

    text = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", text)
    return _ROLE.sub(link, text)
