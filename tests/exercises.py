"""The exercises of docs/exercises.md. For whoever solves them:

    python tests/exercises.py 3               empties its functions in this tree, for you to write
    python tests/exercises.py 3 --solution    puts those of the last commit back, and nothing else

`python tests/exercises.py grade` is for tests/test_docs.py.
"""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def exercises():
    """docs/exercises.md -> {number: ([(file, function)], [(test file, test)])}."""
    _, *parts = re.split(
        r"^## Exercise (\d+)",
        (ROOT / "docs" / "exercises.md").read_text().split("\n## Open")[0],
        flags=re.M,
    )
    return {
        int(number): tuple(
            [
                tuple(name.split(": "))
                for line in re.findall(rf"- \*\*{what}\*\* (.*)", text)
                for name in re.findall("`([^`]+)`", line)
            ]
            for what in ("Empty", "Tests")
        )
        for number, text in zip(parts[::2], parts[1::2])
    }


parsed = functools.cache(ast.parse)


def definition(source, name):
    """The ast node of the function or class `name`, or `Class.method`, at the top of a file's
    source; None if there is none.
    """
    body, node = parsed(source).body, None
    for part in name.split("."):
        node = next((node for node in body if getattr(node, "name", None) == part), None)
        body = getattr(node, "body", [])
    return node


def lines_of(source, name):
    """The source lines of that definition."""
    node = definition(source, name)
    return source.splitlines()[node.lineno - 1 : node.end_lineno]


def replaced(source, name, lines):
    """The source with other lines for that definition."""
    node, old = definition(source, name), source.splitlines()
    return "\n".join([*old[: node.lineno - 1], *lines, *old[node.end_lineno :], ""])


def emptied(source, name, message):
    """The source with everything but the docstring of the function `name` replaced by a
    NotImplementedError.
    """
    node, lines = definition(source, name), lines_of(source, name)
    first = node.body[0]
    kept = (first.end_lineno if ast.get_docstring(node) else first.lineno - 1) - node.lineno + 1
    return replaced(
        source,
        name,
        [*lines[:kept], " " * first.col_offset + f"raise NotImplementedError({message!r})"],
    )


def empty(functions, root, number):
    """Empty [(file, function)] of an exercise in the tree `root`."""
    for file, name in functions:
        path = root / file
        path.write_text(emptied(path.read_text(), name, f"exercise {number}: {name}"))


def main(words):
    """Empty exercises, or put their solutions back -> the exit code.

    2, one line, and nothing changed, where that cannot be or would lose what somebody wrote.
    """
    numbers, solution = [int(word) for word in words if word.isdigit()], "--solution" in words
    if not numbers or not set(numbers) <= set(exercises()):
        print(__doc__, file=sys.stderr)
        return 2
    sources, told = {}, []
    for number, (file, name) in [
        (number, function) for number in numbers for function in exercises()[number][0]
    ]:
        committed = subprocess.run(
            ["git", "show", f"HEAD:{file}"], cwd=ROOT, capture_output=True, text=True
        )
        if committed.returncode:
            print(f"{file} is in no git commit: this is for a clone", file=sys.stderr)
            return 2
        source, message = (
            sources.get(file) or (ROOT / file).read_text(),
            f"exercise {number}: {name}",
        )
        try:
            mine = lines_of(source, name)
        except (SyntaxError, AttributeError) as error:  # AttributeError: it is not there
            print(f"{file}: there is no {name} to replace ({error})", file=sys.stderr)
            return 2
        ours = lines_of(committed.stdout, name)
        if not solution and mine not in (
            ours,
            lines_of(emptied(committed.stdout, name, message), name),
        ):
            print(f"{file}: {name} is not that of the last commit: commit yours first, "
                  "or it would be lost", file=sys.stderr)
            return 2
        sources[file] = replaced(source, name, ours) if solution else emptied(source, name, message)
        fate = "that of the last commit again" if solution else "yours to write"
        told.append(f"exercise {number}: {file}: {name} is {fate}")
    for file, source in sources.items():
        (ROOT / file).write_text(source)
    print("\n".join(told))
    return 0


def trees():
    """What test_docs.py looks at: [([(number, [(file, function)])] emptied, exercises to test)].

    Without exercises n, n + 1, …, the tests of n - 1 and n; and each function of an exercise that
    has several alone, its own tests.
    """
    all_of = exercises()
    cases = [
        ([(later, all_of[later][0]) for later in all_of if later > n], [n, n + 1])
        for n in range(len(all_of) + 1)
    ]
    return cases + [
        ([(n, [function])], [n])
        for n, (functions, _) in all_of.items()
        if len(functions) > 1
        for function in functions
    ]


def grade():
    """Print as JSON, for each of `trees()`, {test: outcomes of its parametrisations}.

    That is what `-k "exercise_3 or exercise_4"` says in a copy of the tree. Copies are graded in
    forks, two at a time, of a process that has imported what takes long.
    """
    import pytest

    sys.path.insert(0, str(ROOT))
    import dcvae  # noqa: F401 (for what it imports)
    import realnvp  # noqa: F401
    import selfvae  # noqa: F401
    import vae  # noqa: F401

    for name in ("common", "vae", "selfvae", "realnvp", "dcvae"):
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests")]

    class Outcomes:
        def __init__(self):
            self.of = {}

        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.failed:
                name = report.nodeid.split("/")[-1].split("[")[0].replace("::", ": ")
                outcomes = self.of.setdefault(name, set())
                outcomes.add(report.outcome)

    def graded(tree, without, numbers):
        """In a fork: empty, run, write down."""
        for number, functions in without:
            empty(functions, tree, number)
        os.chdir(tree)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        numbers, outcomes = [n for n in numbers if n in exercises()], Outcomes()
        files = sorted({f"tests/{file}" for n in numbers for file, _ in exercises()[n][1]})
        pytest.main(
            [
                "-q",
                "-p",
                "no:cacheprovider",
                "--assert=plain",
                "-k",
                " or ".join(f"exercise_{n}" for n in numbers),
                *files,
            ],
            plugins=[outcomes],
        )
        (tree / "outcomes.json").write_text(
            json.dumps({name: sorted(of) for name, of in outcomes.of.items()})
        )

    with tempfile.TemporaryDirectory() as folder:
        copies, running = [Path(folder, str(i)) for i in range(len(trees()))], []
        for tree, (without, numbers) in zip(copies, trees()):
            (tree / "docs").mkdir(parents=True)
            shutil.copy(ROOT / "docs" / "exercises.md", tree / "docs")
            shutil.copytree(
                ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__")
            )
            for path in ROOT.glob("*.py"):
                shutil.copy(path, tree)
            running.append(os.fork())
            if not running[-1]:
                try:
                    graded(tree, without, numbers)
                finally:
                    os._exit(0)
            if len(running) == 2:
                os.waitpid(running.pop(0), 0)
        for child in running:
            os.waitpid(child, 0)
        print(json.dumps([json.loads((tree / "outcomes.json").read_text()) for tree in copies]))


if __name__ == "__main__":
    sys.exit(grade() if sys.argv[1:] == ["grade"] else main(sys.argv[1:]))
