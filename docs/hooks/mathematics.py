"""Formulas to MathML while building: browsers draw it themselves, without a script or a font from elsewhere."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $..$ and $$..$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Every formula in its place; one that cannot be read ends the build."""
    return FORMULA.sub(lambda found: convert(unescape(found[3]).strip(), display="inline" if found[2] == "(" else "block"), html)
