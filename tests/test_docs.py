"""The teaching texts, held to the code: equation map, symbols, math, links, numeric examples, figures, commands, exercises."""

import ast
import contextlib
import importlib
import io
import json
import re
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import MODELS, ROOT, call, flags_for
from exercises import definition, emptied, exercises, lines_of, trees
from test_agreements import MARK, PAGES, SOURCES, commands
from test_runs import cut_short

TEXTS = {page.name: page.read_text() for page in PAGES}
DERIVATIONS = ["vae.md", "realnvp.md", "selfvae.md", "dcvae.md", "likelihood.md", "evaluation.md"]
TESTS = {(path.name, node.name) for path in (ROOT / "tests").glob("test_*.py") for node in ast.parse(path.read_text()).body
         if isinstance(node, ast.FunctionDef)}


def test_every_test_named_in_the_docs_exists():
    """`test_x.py: test_name` is a function at the top of tests/test_x.py; in errata.md and equations.md no mention has another form."""
    for page, text in TEXTS.items():
        named = re.findall(r"`(test_\w+\.py): (test_\w+)`", text)
        assert set(named) <= TESTS, (page, set(named) - TESTS)
        if page in ("errata.md", "equations.md", "exercises.md"):
            assert named and len(re.findall(r"(?<!tests/)\btest_", text)) == 2 * len(named), page


RELEASED = {"loss.py", "distributions.py", "srvae.py", "nn_layers.py", "train.py", "main.py", "plotting.py", "misc.py"}  # files of the papers' codes


def test_every_definition_named_in_the_docs_exists():
    """`file.py: name`, `file.py: Class.method`, or a constant there. Files that are none of ours are those of the released codes, on the page of errata."""
    for page, text in TEXTS.items():
        for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", text):
            file = f"tests/{file}" if file.startswith("test_") else file
            if not (page == "errata.md" and file in RELEASED):
                source = (ROOT / file).read_text()
                assert definition(source, name) or re.search(rf"^{name}\b.* = ", source, re.M), f"{page}: {file}: {name}"


# ---- Equations ---------------------------------------------------------------------------------------------------------

PAPERS = {"vae.py": "selfVAE paper", "selfvae.py": "selfVAE paper", "dcvae.py": "DC-VAE paper", "realnvp.py": "Dinh et al. 2016"}
SECTIONS = {"2": "selfVAE paper", "3": "DC-VAE paper", "4": "Dinh et al. 2016"}
TAG = re.compile(r"(?:([\w-]+ paper|\w+ et al\. \d{4}|\w+ & \w+ \d{4}), )?"
                 r"Eqs?\. ((?:\([\w.]+\)(?:, by masks Eq\. | to | and |, )?)+)")


def tags(text, paper):
    """Equations that a text names -> {(paper, number)}; without the name of a paper they are of `paper`. "(3) to (5)" are three."""
    found = set()
    for source, run in TAG.findall(text):
        numbers = re.findall(r"\(([\w.]+)\)", run)
        for first, last in re.findall(r"\(([\w.]+)\) to \(([\w.]+)\)", run):
            stem = first.rstrip("0123456789") if first[-1].isdigit() else first[:-1]
            between = range(int(first[len(stem):]), int(last[len(stem):])) if first[-1].isdigit() else range(ord(first[-1]), ord(last[-1]))
            numbers += [f"{stem}{n if first[-1].isdigit() else chr(n)}" for n in between]
        found |= {(source or paper, number) for number in numbers}
    return found


def equation_map():
    """docs/equations.md, sections 2 to 5 -> {(paper, number): ([(file, function)], [(test file, test)])}."""
    rows = {}
    for section in re.split(r"^## ", TEXTS["equations.md"], flags=re.M)[2:]:
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if line.startswith("|") and "Eq." in cells[0]:
                assert len(cells) == 5, line
                (key,) = tags(cells[0].strip(), SECTIONS.get(section[0]))
                assert key not in rows and key[0], line
                rows[key] = re.findall(r"`(\w+\.py): ([\w.]+)`", cells[3]), re.findall(r"`(\w+\.py): (\w+)`", cells[4])
    return rows


def test_tags_are_read():
    assert tags("x (Eq. (2)), Burda et al. 2015, Eq. (8); Eqs. (3.3c) to (3.3e), (A.4a), and Eqs. (9) to (11)", "P") == {
        ("P", "2"), ("Burda et al. 2015", "8"), *(("P", n) for n in ("3.3c", "3.3d", "3.3e", "A.4a", "9", "10", "11"))}
    assert tags("Affine coupling (Dinh et al. 2016, Eqs. (4), (5), by masks Eq. (9))", "P") == {("Dinh et al. 2016", n) for n in "459"}
    assert tags("the mixture in the selfVAE paper, Eqs. (3.2c), (3.2e), and Salimans & Kingma 2016, Eq. (2)", None) == {
        ("selfVAE paper", "3.2c"), ("selfVAE paper", "3.2e"), ("Salimans & Kingma 2016", "2")}


def test_all_equations_are_on_the_map():
    """The numbered ones of both papers, and the displays without a number."""
    displays = {"2.1": 1, "2.2": 2, "3.2": 8, "3.3": 7, "3.4": 1, "A.2": 1, "A.4": 5}
    wanted = {("selfVAE paper", f"{section}{chr(97 + i)}") for section, count in displays.items() for i in range(count)}
    wanted |= {("selfVAE paper", n) for n in "12"} | {("DC-VAE paper", n) for n in "123456789"}
    assert wanted <= set(equation_map())


def test_functions_on_the_map_name_their_equations():
    """Each function exists and carries the tag; each row but that of the prior not taken has a function and a test."""
    for (paper, number), (functions, tests) in equation_map().items():
        assert (functions and tests) or number == "A.2a", number
        assert set(tests) <= TESTS
        for file, name in functions:
            assert definition(SOURCES[file], name), f"{file}: {name}"
            assert (paper, number) in tags("\n".join(lines_of(SOURCES[file], name)), PAPERS.get(file)), f"{file}: {name} does not name Eq. ({number})"


def blocks(file):
    """[(name, text)] of a file: its functions and methods, copies left out (their original is looked at), and "" for what is between them."""
    lines, found, taken = SOURCES[file].splitlines(), [], set()
    for node in ast.parse(SOURCES[file]).body:
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        mark = MARK.match(lines[first - 2])
        if mark and mark[1] == "Copied":
            taken |= set(range(first, node.end_lineno + 1))
            continue
        inner = [(f"{node.name}.{item.name}", item) for item in node.body if isinstance(item, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        for name, item in inner + ([(node.name, node)] if isinstance(node, ast.FunctionDef) else []):
            found.append((name, "\n".join(lines[item.lineno - 1:item.end_lineno])))
            taken |= set(range(item.lineno, item.end_lineno + 1))
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            rest = [i for i in range(node.lineno, node.end_lineno + 1) if i not in taken]
            found.append((node.name, "\n".join(lines[i - 1] for i in rest)))
            taken |= set(rest)
    return found + [("", "\n".join(line for i, line in enumerate(lines, 1) if i not in taken))]


@pytest.mark.parametrize("file", SOURCES)
def test_equations_named_in_the_code_are_on_the_map(file):
    """And a function that names an equation, other than in a NOTE(paper), stands in its row, or its class does."""
    known = equation_map()
    for name, text in blocks(file):
        assert not re.search(r"\bEqs?\. ?\d", text), f"{file}: {name}: an equation's number stands in parentheses"
        assert tags(text, PAPERS.get(file)) <= set(known), (file, name, tags(text, PAPERS.get(file)) - set(known))
        for key in tags(re.sub(r"NOTE\(paper\).*(\n +# .*)?", "", text), PAPERS.get(file)) if name else ():
            assert (file, name) in known[key][0] or (file, name.split(".")[0]) in known[key][0], f"{file}: {name} names Eq. {key}, whose row does not name it"


# ---- Math --------------------------------------------------------------------------------------------------------------

MACROS = set("""alpha beta delta varepsilon theta lambda mu pi sigma Sigma tau varphi nabla partial log exp ln sin cos tanh max min det frac sqrt sum int prod
    left right big underbrace lVert rVert Vert lvert rvert mid ge le lt gt approx propto to sim in cdot circ times ast infty ldots dots cdots
    lfloor rfloor tilde hat mathrm mathtt quad qquad mathbb begin end eta nu leftarrow""".split())  # no \\, \, or \_: Markdown takes their backslash


def formulas(text):
    """A page -> its formulas, without code; a `$` that opens or closes none is an error."""
    found = re.findall(r"^```math\n(.*?)\n```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "CODE", text)
    found += re.findall(r"\$\$(.+?)\$\$", text)
    text = re.sub(r"\$\$.+?\$\$", "DISPLAY", text)
    for line in text.splitlines():
        parts = line.split("$")
        assert len(parts) % 2, f"an open $: {line}"
        for before, inside, after in zip(parts[::2], parts[1::2], parts[2::2]):
            assert inside and inside == inside.strip(), f"a space beside $: {line}"
            assert not before or before[-1] in " (|[\"", f"${inside}$ follows a letter: {line}"
            assert not after or after[0] in " ).,;:|?!\"'-]" or after.startswith("**"), f"${inside}$ is followed by {after[0]}: {line}"
            assert not (line.startswith("|") and re.search(r"(?<!\\)\|", inside)), f"| ends a table's cell: {line}"
            found.append(inside)
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_math_is_well_formed(page):
    for formula in formulas(TEXTS[page]):
        assert set(re.findall(r"\\([A-Za-z]+|.)", formula)) <= (MACROS | {"\\"} if f"```math\n{formula}\n```" in TEXTS[page] else MACROS), formula
        assert len(re.findall(r"\\left(?!arrow)", formula)) == formula.count(r"\right"), formula
        assert formula.count(r"\begin") == formula.count(r"\end"), formula
        assert "<" not in formula and ">" not in formula, f"Markdown takes < for a tag: {formula}"
        depth = 0
        for bracket in re.findall(r"(?<!\\)[{}]", formula):
            depth += 1 if bracket == "{" else -1
            assert depth >= 0, formula
        assert depth == 0, formula


def symbols(formula):
    """The letters and Greek macros of a formula, words and functions left out."""
    formula = re.sub(r"\\(mathrm|mathtt|mathbb|begin|end)\s*\{[^}]*\}", " ", formula)
    greek = set(re.findall(r"\\(alpha|beta|delta|varepsilon|eta|theta|lambda|mu|nu|pi|sigma|Sigma|tau|varphi)(?![A-Za-z])", formula))
    return greek | set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", formula)))


def test_every_symbol_is_in_the_one_table():
    """Each letter of a formula on a derivation's page stands in a row for that page; on the other pages in any row."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in TEXTS["equations.md"].split("## 1. Symbols")[1].split("## 2.")[0].splitlines() if line.startswith("| $")]
    pages = {page.removesuffix(".md") for page in TEXTS}
    assert all(len(row) == 5 and set(re.split("[,;] ", row[3])) <= pages | {"all"} for row in rows)
    for page, text in TEXTS.items():
        mine = [row for row in rows if page not in DERIVATIONS or {"all", page.removesuffix(".md")} & set(re.split("[,;] ", row[3]))]
        known = set("deT").union(*(symbols(formula) for row in mine for formula in re.findall(r"\$([^$]+)\$", row[0])))  # d a differential, e Euler's number, T a transpose
        unknown = {symbol: formula for formula in formulas(text) for symbol in symbols(formula) - known}
        assert not unknown, (page, unknown)
    for row in rows:  # and no row is of a page that does not need it
        for page in set(re.split("[,;] ", row[3])) - {"all"}:
            used = set().union(*map(symbols, formulas(TEXTS[f"{page}.md"]))) | set(re.findall(r"(?<![\w*])[A-Za-z](?!\w)", TEXTS[f"{page}.md"]))
            assert set().union(*map(symbols, re.findall(r"\$([^$]+)\$", row[0]))) & used, (page, row[0])


# ---- Links and figures -------------------------------------------------------------------------------------------------

def anchors(text):
    """The anchors that a Git host makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text()) + re.findall(r'(?:src|href)="([^"]+)"', page.read_text())
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"


@pytest.mark.parametrize("page", TEXTS)
def test_sections_that_are_referred_to_exist(page):
    """`[page.md](page.md), section 3` and `sections 3 to 6`: that page has a heading with that number, and so this one, for `(section 3)`."""
    found = re.findall(r"\]\((?:docs/)?(\w+\.md)\), sections? ((?:\d+(?!\.\d)(?:, | to | and )?)+)", TEXTS[page])
    found += [(page, number) for number in re.findall(r"\(section (\d+)\)", TEXTS[page])]
    for target, numbers in found:
        for number in re.findall(r"\d+", numbers):
            assert re.search(rf"^## {number}\. ", TEXTS[target], re.M), f"{page}: {target}, section {number}"


def made_by(picture, section):
    """Whether a section has the command that made a picture: `script-what-….png` a run of that script on `what`; others by their own name."""
    script, what, *_ = [*picture.removesuffix(".png").split("-"), ""]
    if script in MODELS:
        ran = any(name == script and (what in words or what == "shapes") for name, words in commands(section))
        return ran and (not picture.endswith("-losses.png") or "python tests/compare.py" in section)
    return bool(re.search(rf"python (docs/figures|tests/benchmark)\.py {script}\b|```python(?:(?!```).)*{script}\.png", section, re.S))


def test_figures_are_small_and_have_their_command():
    """Every PNG is shown in the docs, and where it is shown stands a command that made it."""
    shown = set()
    for page, text in TEXTS.items():
        for section in re.split(r"^## ", text, flags=re.M):
            pictures = set(re.findall(r"figures/([\w.-]+\.png)", section))
            shown |= pictures
            missing = [picture for picture in pictures if page != "README.md" and not made_by(picture, section)]
            assert not missing, f"{page}, {section.splitlines()[0]}: {missing}"
    files = {path.name: path for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert shown == set(files)
    for name, path in files.items():
        assert path.stat().st_size < 300_000, name
        assert matplotlib.image.imread(path).std() > 0.01, f"{name} is blank"


def test_figures_can_be_drawn(tmp_path, monkeypatch, tiny_data, capsys):
    """docs/figures.py: those that take a second, and, on a few grey shapes, that which trains; a run of another script is refused."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    (tmp_path / "mnist-32").mkdir()
    for split in ("train", "test"):
        images = np.load(tiny_data / "shapes-32" / f"{split}.npy")[..., :1]
        np.save(tmp_path / "mnist-32" / f"{split}.npy", images)
        np.save(tmp_path / "mnist-32" / f"{split}-labels.npy", np.zeros(len(images), np.uint8))
    figures.levels(), figures.mixture(), figures.holes(tmp_path, 2)
    assert [matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.05 for name in ("levels", "mixture", "holes")] == [True] * 3
    assert re.search(r"flow: validation, .* re \d+\.\d \+ kl \d+\.\d\d = \d+\.\d\n +KL\(q\(z\) \|\| p\(z\)\) ", capsys.readouterr().out)
    torch.save({"script": "realnvp"}, tmp_path / "best.pt")
    with pytest.raises(SystemExit, match="takes one of vae.py"):
        figures.tighten(tmp_path)


# ---- Numeric examples --------------------------------------------------------------------------------------------------

EXAMPLE = re.compile(r"^```python\n((?:(?!^```).)*)^```\n\n^```\n((?:(?!^```).)*)^```\n*", re.M | re.S)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]\d+)?")


def alike(printed, expected):
    """Two texts with the same words, whose numbers differ by two units of the last digit at most: another machine may round otherwise."""
    unit = lambda number: 10.0 ** (int(number.partition("e")[2] or 0) - len(number.partition("e")[0].partition(".")[2]))
    pairs = list(zip(NUMBER.findall(printed), NUMBER.findall(expected)))
    return NUMBER.sub("#", printed) == NUMBER.sub("#", expected) and all(abs(float(a) - float(b)) <= 2.01 * unit(b) * ("." in b) for a, b in pairs)


def test_alike():
    assert alike("S = 4  gap 0.123", "S = 4  gap 0.122") and not alike("S = 4  gap 0.129", "S = 4  gap 0.122")
    assert not alike("S = 5  gap 0.122", "S = 4  gap 0.122") and not alike("a 1.0", "b 1.0") and not alike("1.0", "1.0 2.0")


@pytest.mark.parametrize("page", DERIVATIONS)
def test_numeric_example(page):
    """The last section of a derivation is code and what it prints."""
    (code, expected), *more = EXAMPLE.findall(TEXTS[page].split("\n## ")[-1])
    assert not more and TEXTS[page].rstrip().endswith("```") and len(code.splitlines()) <= 20
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    assert alike(printed.getvalue(), expected), printed.getvalue()


# ---- Commands: all parse (test_agreements), the cheap ones are run -------------------------------------------------------

CHEAP = sorted({(script, *words) for script, words in commands(TEXTS["README.md"]) if script in MODELS
                and not {*words} & {"cifar10", "imagenette", "--fid", "--accumulate"}})


@pytest.mark.parametrize("line", CHEAP, ids=" ".join)
def test_commands_of_the_readme_run(line, tiny_data, tmp_path, monkeypatch):
    """Those that need no download, as printed but for their length: two steps, on tiny data."""
    cut_short(monkeypatch)
    assert call(line[0], [*line[1:], *flags_for(line[0], tiny_data, tmp_path, **({"batch_size": 500} if "moons" in line else {}))]) == 0


def test_the_cheap_ones_are_some():
    assert {line[0] for line in CHEAP} >= {"selfvae", "realnvp"} and any("--help" in line for line in CHEAP)


# ---- Exercises ---------------------------------------------------------------------------------------------------------

def test_exercises_are_complete():
    """Some twelve, numbered from 1, each with how long it takes, functions that have docstrings, tests, an equation, a hint, something to look at."""
    page = TEXTS["exercises.md"]
    assert list(exercises()) == list(range(1, len(exercises()) + 1)) and len(exercises()) >= 12
    for number, (functions, tests) in exercises().items():
        text = page.split(f"\n## Exercise {number}: ")[1].split("\n## ")[0]
        assert functions and tests and set(tests) <= TESTS, set(tests) - TESTS
        assert re.match(r".* \((an hour|two hours|half a day|a day|two days|a week)\)\n", text), number
        assert all(re.search(rf"- \*\*{what}\*\* \S.{{20}}", text) for what in ("Equation", "Hint", "Look at")), number
        equations = re.search(r"\*\*Equation\*\* (.*)", text)[1]
        assert tags(equations, None) <= set(equation_map()) and ("Eq" in equations or "](" in equations), number
        assert all(ast.get_docstring(definition(SOURCES[file], name)) for file, name in functions), functions


def test_exercises_are_graded(grades):
    """In a copy of the tree without exercises n, n + 1, … all tests of n fail, where n is there and n + 1, … are not all pass; and if one of
    an exercise's functions is missing, some fail. `-k exercise_n` selects these tests and no others."""
    wrong, tests = [], {n: set(map(": ".join, tests)) for n, (_, tests) in exercises().items()}
    for (without, numbers), outcomes in zip(trees(), json.loads(grades())):
        emptied_here = {n: functions for n, functions in without}
        assert set(outcomes) == set().union(*(tests.get(n, set()) for n in numbers)), numbers
        for n in filter(tests.get, numbers):
            if len(emptied_here) == 1 and emptied_here.get(n, exercises()[n][0]) != exercises()[n][0]:
                if not any("failed" in outcomes[name] for name in tests[n]):
                    wrong += [f"exercise {n} is graded right without {emptied_here[n]}"]
            else:
                wanted = ["failed"] if n in emptied_here else ["passed"]
                wrong += [f"without {list(emptied_here)}, {name} of exercise {n} is {outcomes[name]}" for name in sorted(tests[n]) if outcomes[name] != wanted]
    assert wrong == []


def test_an_emptied_function_keeps_its_docstring():
    source = 'class A:\n    def f(self):\n        """Doc."""\n        # how\n        return 1\n\n    def g(self, x):\n        return x\n'
    assert emptied(source, "A.f", "m") == source.replace("# how\n        return 1", "raise NotImplementedError('m')")
    assert emptied(source, "A.g", "m") == source.replace("return x", "raise NotImplementedError('m')")


def test_exercises_are_emptied_and_put_back(tmp_path):
    """The command line, in a repository of its own: nothing that somebody wrote is overwritten, and a solution brings back its functions alone."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs").mkdir()
    for file in ("common.py", "tests/exercises.py", "docs/exercises.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    shell = lambda line: subprocess.run(line.replace("python", sys.executable), shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert shell("git init -q && git add . && git -c user.name=a -c user.email=a commit -qm one").returncode == 0
    path, ours = tmp_path / "common.py", (tmp_path / "common.py").read_text()
    assert shell("python tests/exercises.py 1 4").returncode == 0 and path.read_text().count("raise NotImplementedError") == 2
    mine = path.read_text().replace("raise NotImplementedError('exercise 1: log_mean_exp')", "return 'mine'")
    path.write_text(mine)
    refused = shell("python tests/exercises.py 1")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "log_mean_exp" in refused.stderr and path.read_text() == mine
    assert shell("python tests/exercises.py 4 --solution").returncode == 0 and path.read_text().count("raise NotImplementedError") == 0
    assert "return 'mine'" in path.read_text() and shell("python tests/exercises.py 1 --solution").returncode == 0 and path.read_text() == ours
    for line, told in (("python tests/exercises.py 99", "--solution"), ("python tests/exercises.py", "--solution"), ("python tests/exercises.py 1 2", "realnvp.py")):
        refused = shell(line)  # 2 is of a file that is not here: 1 is left alone too
        assert refused.returncode == 2 and told in refused.stderr and path.read_text() == ours
    path.write_text(ours.replace("def log_mean_exp(", "def log_mean_exp(("))
    refused = shell("python tests/exercises.py 1 --solution")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
