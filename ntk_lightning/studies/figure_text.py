"""Labels and numbers of figures as text: plain, in HTML, shortened."""

from __future__ import annotations

import html
import math
import re

__all__ = ["html_text", "interval_text", "number_text", "plain_text", "size_text"]


def size_text(size: int) -> str:
    """Shorten a size: 16000 becomes 16k.

    Returns:
        The text.

    Example:
        >>> size_text(16000), size_text(1250)
        ('16k', '1250')
    """
    return f"{size // 1000}k" if size >= 1000 and size % 1000 == 0 else str(size)


def plain_text(text: str) -> str:
    """Write a label without markup: "$K^F_{16k}(n)$" becomes "K^F_16k(n)".

    Returns:
        The text.
    """
    return re.sub(r"\$([^$]*)\$", lambda match: re.sub(r"[{}\\]", "", match[1]), text)


def html_text(text: str) -> str:
    """Write a label as HTML, with indices as such and everything else escaped.

    Returns:
        HTML.

    Example:
        >>> html_text("$K_{16k}(n)$ < 1")
        '<i>K<sub>16k</sub>(n)</i> &lt; 1'
    """

    def mathematics(match: re.Match[str]) -> str:
        inner = match[1]
        for sign, tag in (("_", "sub"), (r"\^", "sup")):
            inner = re.sub(sign + r"(?:{([^}]*)}|(.))", rf"<{tag}>\1\2</{tag}>", inner)
        return f"<i>{inner}</i>"

    return re.sub(r"\$([^$]*)\$", mathematics, html.escape(text))


def interval_text(interval: tuple[float, float]) -> str:
    """Write a confidence interval.

    Returns:
        Text such as "[0.25, 0.33]".
    """
    if not all(map(math.isfinite, interval)):
        return "[no interval]"
    return f"[{number_text(interval[0], 2)}, {number_text(interval[1], 2)}]"


def number_text(value: float, digits: int) -> str:
    """Write a number with so many digits behind the point, and 0 without a sign.

    Returns:
        The text.

    Example:
        >>> number_text(-0.0001, 2)
        '0.00'
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"
