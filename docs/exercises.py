"""Empties and restores the functions of docs/exercises.md. For students:

    python docs/exercises.py 3               empties the functions of exercise 3, for you to write,
                                              and others that would give them away
    python docs/exercises.py 3 --solution    puts all of these back as in the last commit

`python docs/exercises.py grade` is for tests/test_docs.py.
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
    found = {}
    for number, text in texts().items():
        found[number] = (listed(text, "Write"), listed(text, "Tests"))
    return found


def texts():
    """{number: text} of the exercises."""
    page = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8").split("\n## Open")[0]
    _, *parts = re.split(r"^## Exercise (\d+)", page, flags=re.M)
    return {int(number): text for number, text in zip(parts[::2], parts[1::2])}


def emptied_by(number):
    """Everything that an exercise empties: [(file, function, number of its own exercise)].

    Its own functions; and those that it hides, because they hold its solution.
    """
    all_of = exercises()
    found = [(file, name, number) for file, name in all_of[number][0]]
    for hidden in listed(texts()[number], "Hides"):
        for other, (functions, _) in all_of.items():
            if hidden in functions:
                found.append((*hidden, other))
    return found


def listed(text, what):
    """The names in the lines "- **Write** …", "- **Hides** …", "- **Tests** …".

    -> [(file, function)].
    """
    names = []
    for line in re.findall(rf"- \*\*{what}\*\* (.*)", text):
        for name in re.findall("`([^`]+)`", line):
            names.append(tuple(name.split(": ")))
    return names


# ---- The source of a definition ------------------------------------------------------------------

parsed = functools.cache(ast.parse)


def definition(source, name):
    """The ast node of the function or class `name`, or `Class.method`; None if there is none.

    It is at the top of a file's source.
    """
    body = parsed(source).body
    for part in name.split("."):
        node = None
        for candidate in body:
            if getattr(candidate, "name", None) == part:
                node = candidate
                break
        body = getattr(node, "body", [])
    return node


def lines_of(source, name):
    """The source lines of that definition; AttributeError if there is none."""
    node = definition(source, name)
    return source.splitlines()[node.lineno - 1:node.end_lineno]


def replaced(source, name, lines):
    """The source with other lines for that definition."""
    node = definition(source, name)
    old = source.splitlines()
    return "\n".join([*old[:node.lineno - 1], *lines, *old[node.end_lineno:], ""])


def emptied(source, name, message):
    """The source with the function `name` a NotImplementedError, all but its docstring."""
    node = definition(source, name)
    first = node.body[0]
    if ast.get_docstring(node):
        last_kept = first.end_lineno
    else:
        last_kept = first.lineno - 1
    kept = lines_of(source, name)[:last_kept - node.lineno + 1]
    indent = " " * first.col_offset
    return replaced(source, name, [*kept, f"{indent}raise NotImplementedError({message!r})"])


def message_of(number, name):
    """What the NotImplementedError of an emptied function says."""
    return (f"{name} is yours to write; to restore ours: "
            f"python docs/exercises.py {number} --solution")


def empty(functions, root, number):
    """Empty [(file, function)] of an exercise in the tree `root`."""
    for file, name in functions:
        path = root / file
        source = path.read_text(encoding="utf-8")
        path.write_text(emptied(source, name, message_of(number, name)), encoding="utf-8")


# ---- The command line ----------------------------------------------------------------------------

def main(words):
    """Empty exercises, or put their solutions back -> the exit code.

    2, one line, and nothing changed, where that cannot be or would lose what somebody wrote.
    """
    numbers = [int(word) for word in words if word.isdigit()]
    solution = "--solution" in words
    all_of = exercises()
    if not numbers or not set(numbers) <= set(all_of):
        print(__doc__, file=sys.stderr)
        return 2
    sources = {}
    told = []
    try:
        for number in numbers:
            for file, name, its_number in emptied_by(number):
                committed = committed_source(file)
                if file not in sources:
                    sources[file] = (ROOT / file).read_text(encoding="utf-8")
                hidden = its_number != number
                if hidden and is_yours(sources[file], committed, name, its_number):
                    continue
                sources[file] = rewritten(sources[file], committed, file, name, its_number,
                                          solution)
                if solution:
                    state = "that of the last commit again"
                elif hidden:
                    state = f"hidden until exercise {its_number}"
                else:
                    state = "yours to write"
                told.append(f"exercise {number}: {file}: {name} is {state}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for file, source in sources.items():
        (ROOT / file).write_text(source, encoding="utf-8")
    print("\n".join(told))
    return 0


def committed_source(file):
    """The source of `file` in the last commit; ValueError if it is in none."""
    show = subprocess.run(["git", "show", f"HEAD:{file}"], cwd=ROOT, capture_output=True,
                          encoding="utf-8")
    if show.returncode:
        raise ValueError(f"{file} is in no git commit: this is for a clone")
    return show.stdout


def rewritten(source, committed, file, name, number, solution):
    """The source of `file` with the function emptied, or with its solution.

    ValueError if it cannot be found, or if emptying it would lose what is not committed.
    """
    try:
        lines_of(source, name)
    except (SyntaxError, AttributeError) as error:  # AttributeError: it is not there
        raise ValueError(f"{file}: there is no {name} to replace ({error})") from None
    ours = lines_of(committed, name)
    if solution:
        return replaced(source, name, ours)
    if is_yours(source, committed, name, number):
        raise ValueError(f"{file}: {name} is not that of the last commit: commit yours first, or "
                         "it would be lost")
    return emptied(source, name, message_of(number, name))


def is_yours(source, committed, name, number):
    """Whether a function is neither that of the last commit nor empty: somebody wrote it."""
    if not definition(source, name):
        return True
    ours = lines_of(committed, name)
    empty_one = lines_of(emptied(committed, name, message_of(number, name)), name)
    return lines_of(source, name) not in (ours, empty_one)


# ---- Grading, for tests/test_docs.py -------------------------------------------------------------

def trees():
    """What test_docs.py looks at: [([(number, [(file, function)])] emptied, exercises that run)].

    Without exercises n, n + 1, …, the tests of n - 1 and n; and each function of an exercise that
    has several alone, its own tests.
    """
    all_of = exercises()
    cases = []
    for n in range(len(all_of) + 1):
        without = [(later, all_of[later][0]) for later in all_of if later > n]
        cases.append((without, [n, n + 1]))
    for n, (functions, _) in all_of.items():
        if len(functions) > 1:
            for function in functions:
                cases.append(([(n, [function])], [n]))
    return cases


class Outcomes:
    """A pytest plugin that gathers {"file: test": outcomes of its parametrisations}."""

    def __init__(self):
        self.of = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            test = report.nodeid.split("/")[-1].split("[")[0].replace("::", ": ")
            self.of.setdefault(test, set()).add(report.outcome)


def grade():
    """Print as JSON, for each of `trees()`, {test: outcomes of its parametrisations}.

    They are what `-k "exercise_3 or exercise_4"` says in a copy of the tree. Copies are graded in
    forks, two at a time, of a process that has imported what takes long.
    """
    sys.path.insert(0, str(ROOT))
    import pytest  # noqa: F401 (this and the next for what they import)
    import dcvae, realnvp, selfvae, vae  # noqa: E401, F401
    for name in ("common", "vae", "selfvae", "realnvp", "dcvae"):
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests")]

    with tempfile.TemporaryDirectory() as folder:
        copies = []
        running = []
        for i, (without, numbers) in enumerate(trees()):
            tree = Path(folder, str(i))
            copies.append(tree)
            copy_tree(tree)
            process = os.fork()
            if process == 0:
                try:
                    grade_copy(tree, without, numbers)
                finally:
                    os._exit(0)
            running.append(process)
            if len(running) == 2:
                os.waitpid(running.pop(0), 0)
        for process in running:
            os.waitpid(process, 0)
        outcomes = []
        for tree in copies:
            outcomes.append(json.loads((tree / "outcomes.json").read_text(encoding="utf-8")))
    print(json.dumps(outcomes))


def copy_tree(tree):
    """The scripts, their tests and the programs of docs/, in a new folder."""
    (tree / "docs" / "lab").mkdir(parents=True)
    for path in [ROOT / "docs" / "exercises.md", *ROOT.glob("docs/**/*.py")]:
        shutil.copy(path, tree / path.relative_to(ROOT))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)


def grade_copy(tree, without, numbers):
    """In a fork: empty the exercises `without`, run the tests of `numbers`, write outcomes.json."""
    import pytest
    for number, functions in without:
        empty(functions, tree, number)
    os.chdir(tree)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    all_of = exercises()
    numbers = [n for n in numbers if n in all_of]
    files = set()
    for n in numbers:
        for file, _ in all_of[n][1]:
            files.add(f"tests/{file}")
    keywords = " or ".join(f"exercise_{n}" for n in numbers)
    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", "--assert=plain", "-k", keywords, *sorted(files)],
                plugins=[outcomes])
    stored = {name: sorted(of_test) for name, of_test in outcomes.of.items()}
    (tree / "outcomes.json").write_text(json.dumps(stored), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["grade"]:
        grade()
    else:
        sys.exit(main(sys.argv[1:]))
