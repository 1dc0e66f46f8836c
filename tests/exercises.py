"""The exercises of docs/exercises.md: `python tests/exercises.py 3` empties the functions of exercise 3 in this tree, for you to write."""

import ast
import functools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def exercises():
    """docs/exercises.md -> {number: ([(file, function)], [(test file, test)])}."""
    _, *parts = re.split(r"^## Exercise (\d+)", (ROOT / "docs" / "exercises.md").read_text().split("\n## Open")[0], flags=re.M)
    return {int(number): tuple([tuple(name.split(": ")) for line in re.findall(rf"- \*\*{what}\*\* (.*)", text) for name in re.findall("`([^`]+)`", line)]
                               for what in ("Empty", "Tests")) for number, text in zip(parts[::2], parts[1::2])}


parsed = functools.cache(ast.parse)


def definition(source, name):
    """The ast node of the function or class `name`, or `Class.method`, at the top of a file's source; None if there is none."""
    body, node = parsed(source).body, None
    for part in name.split("."):
        node = next((node for node in body if getattr(node, "name", None) == part), None)
        body = getattr(node, "body", [])
    return node


def emptied(source, name, message):
    """The source with everything but the docstring of the function `name` replaced by a NotImplementedError."""
    node, lines = definition(source, name), source.splitlines()
    first = node.body[0]
    kept = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    return "\n".join([*lines[:kept], " " * first.col_offset + f"raise NotImplementedError({message!r})", *lines[node.end_lineno:], ""])


def empty(number, root=ROOT):
    """Empty the functions of one exercise in the tree `root` -> the names of the files that changed."""
    functions, _ = exercises()[number]
    for file, name in functions:
        path = root / file
        path.write_text(emptied(path.read_text(), name, f"exercise {number}: {name}"))
    return sorted({file for file, _ in functions})


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        print(f"exercise {number}: {', '.join(f'{file}: {name}' for file, name in exercises()[number][0])}; our solution comes back with git checkout {' '.join(empty(number))}")
