"""Turns our docstrings, which are plain text, into Markdown for the site: `name: meaning` becomes an item of a list.

A line that starts with `name:` or `name, name:` begins an item, and so does such a beginning after a full stop. What is
indented below goes on with it; what is indented below nothing is an equation or code.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from griffe import Extension, Object

NAMES = r"([a-z_]\w*(?:, [a-z_]\w*)*): "


def escaped(text: str) -> str:
    """`text` with what Markdown would take for markup, outside of backticks, made literal."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def item(text: str) -> list[str]:
    """The items of the list that `text` stands for: usually one, more where it holds several names."""
    found = re.split(rf"(?:^|(?<=\. )){NAMES}", text)[1:]
    return [
        f"* **{', '.join(f'`{name}`' for name in names.split(', '))}**: {escaped(meaning.strip())}"
        for names, meaning in zip(found[::2], found[1::2], strict=True)
    ]


def block(lines: list[str]) -> list[str]:
    """The Markdown of a block of lines without a blank one: paragraphs, lists and code."""
    if all(line.startswith("    ") for line in lines):
        return ["\n".join(lines)]
    parts: list[tuple[bool, str]] = []  # (is an item, text)
    for line in lines:
        if re.match(NAMES, line):
            parts.append((True, line))
        elif parts and (line.startswith(" ") or not parts[-1][0]):
            parts[-1] = (parts[-1][0], f"{parts[-1][1]} {line.strip()}")
        else:
            parts.append((False, line))
    return ["\n".join(item(text)) if is_item else escaped(text) for is_item, text in parts]


def markdown(docstring: str) -> str:
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(part for lines in blocks for part in block(lines.splitlines()))


class PlainText(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
