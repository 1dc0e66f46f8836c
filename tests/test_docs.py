"""The teaching texts, held to the code.

Equation map, symbols, math, links, code blocks, numeric examples, figures, commands, exercises.
"""

import ast
import contextlib
import dataclasses
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

import common
import longruns
from conftest import MODELS, ROOT, SCRIPTS, call, flags_for, narrow_networks, pictures_on
from exercises import definition, emptied, exercises, lines_of, trees
from test_agreements import INDEX, MARK, PAGES, PYTHON, SOURCES, commands
from test_runs import cut_short, nothing

TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
DERIVATIONS = ["vae.md", "realnvp.md", "selfvae.md", "dcvae.md", "likelihood.md", "evaluation.md"]


def all_tests():
    """{(test file, test)} of what is in tests/."""
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found.add((path.name, node.name))
    return found


TESTS = all_tests()


def test_rows_of_the_results_are_those_of_the_runs(capsys):
    """Else a number in results.md was typed by hand, or is of another run than docs/lab/logs."""
    longruns.main("table")
    printed = capsys.readouterr().out.splitlines()
    shown = []
    for line in TEXTS["results.md"].splitlines():
        if line.startswith("| ") and line.split()[1] in longruns.COMMANDS:
            shown.append(line)
    rows = [line for line in printed if line.startswith("| ") and not line.startswith("| run ")]
    assert sorted(rows) == sorted(shown)


def test_every_test_named_in_the_docs_exists():
    """`test_x.py: test_name` is a function at the top of tests/test_x.py.

    In errata.md, equations.md and exercises.md no mention has another form.
    """
    for page, text in TEXTS.items():
        named = re.findall(r"`(test_\w+\.py): (test_\w+)`", text)
        assert set(named) <= TESTS, (page, set(named) - TESTS)
        if page in ("errata.md", "equations.md", "exercises.md"):
            mentions = re.findall(r"(?<!tests/)\btest_", text)
            assert named and len(mentions) == 2 * len(named), page


# Files of the papers' codes.
RELEASED = {"loss.py", "distributions.py", "srvae.py", "nn_layers.py", "train.py", "main.py",
            "plotting.py", "misc.py"}


def test_every_definition_named_in_the_docs_exists():
    """`file.py: name`, `file.py: Class.method`, or a constant there.

    Files that are none of ours are those of the released codes, on the page of errata.
    """
    for page, text in TEXTS.items():
        for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", text):
            if page == "errata.md" and file in RELEASED:
                continue
            folder = "tests/" if file.startswith("test_") else ""
            source = (ROOT / f"{folder}{file}").read_text(encoding="utf-8")
            constant = re.search(rf"^{name}\b.* = ", source, re.M)
            assert definition(source, name) or constant, f"{page}: {file}: {name}"


# Flags of programs that are none of the four scripts.
OTHERS = {"nproc_per_node", "solution", "img_size", "bottom_width"}


def test_every_flag_named_in_the_docs_exists():
    """Also those that stand in a sentence. Commands of results.md are those of their commits."""
    known = set(OTHERS) | {"help"}
    for script in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(script).Config):
            known |= {field.name, f"no-{field.name}"} if field.type is bool else {field.name}
    for page, text in TEXTS.items():
        if page != "results.md":
            named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
            assert named <= known, (page, named - known)


# ---- Equations -----------------------------------------------------------------------------------

PAPERS = {"vae.py": "selfVAE paper", "selfvae.py": "selfVAE paper",
          "dcvae.py": "DC-VAE paper", "realnvp.py": "Dinh et al. 2016"}
SECTIONS = {"2": "selfVAE paper", "3": "DC-VAE paper", "4": "Dinh et al. 2016"}
TAG = re.compile(r"(?:([\w-]+ paper|\w+ et al\. \d{4}|\w+ & \w+ \d{4}), )?"
                 r"Eqs?\. ((?:\([\w.]+\)(?:, by masks Eq\. | to | and |, )?)+)")


def between(first, last):
    """"3.3c", "3.3f" -> ["3.3d", "3.3e"]; "13", "16" -> ["14", "15"]."""
    if first[-1].isdigit():
        stem = first.rstrip("0123456789")
        numbers = range(int(first[len(stem):]) + 1, int(last[len(stem):]))
        return [f"{stem}{n}" for n in numbers]
    return [first[:-1] + chr(n) for n in range(ord(first[-1]) + 1, ord(last[-1]))]


def tags(text, paper):
    """Equations that a text names -> {(paper, number)}; "(3) to (5)" are three.

    Without the name of a paper they are of `paper`. A name may end on the line before.
    """
    text = re.sub(r"\s*\n\s*(# )?", " ", text)
    found = set()
    for source, run in TAG.findall(text):
        numbers = re.findall(r"\(([\w.]+)\)", run)
        for first, last in re.findall(r"\(([\w.]+)\) to \(([\w.]+)\)", run):
            numbers += between(first, last)
        for number in numbers:
            found.add((source or paper, number))
    return found


def cells_of(line):
    """The cells of a table's row."""
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def equation_map():
    """docs/equations.md, sections 2 to 5.

    -> {(paper, number): ([(file, function)], [(test file, test)])}.
    """
    rows = {}
    for section in re.split(r"^## ", TEXTS["equations.md"], flags=re.M)[2:]:
        for line in section.splitlines():
            cells = cells_of(line)
            if not line.startswith("|") or "Eq." not in cells[0]:
                continue
            assert len(cells) == 5, line
            (key,) = tags(cells[0], SECTIONS.get(section[0]))
            assert key not in rows and key[0], line
            functions = re.findall(r"`(\w+\.py): ([\w.]+)`", cells[3])
            rows[key] = functions, re.findall(r"`(\w+\.py): (\w+)`", cells[4])
    return rows


def of_paper(paper, *numbers):
    """-> {(paper, number)}."""
    return {(paper, number) for number in numbers}


def test_tags_are_read():
    text = ("x (Eq. (2)), Burda et al. 2015, Eq. (8); Eqs. (3.3c) to (3.3e), (A.4a), "
            "and Eqs. (9) to (11)")
    mine = of_paper("P", "2", "3.3c", "3.3d", "3.3e", "A.4a", "9", "10", "11")
    assert tags(text, "P") == mine | of_paper("Burda et al. 2015", "8")
    text = "Affine coupling (Dinh et al. 2016, Eqs. (4), (5), by masks Eq. (9))"
    assert tags(text, "P") == of_paper("Dinh et al. 2016", "4", "5", "9")
    text = ("the mixture in the selfVAE paper,\n    # Eqs. (3.2c), (3.2e), "
            "and Salimans & Kingma 2016, Eq. (2)")
    assert tags(text, None) == (of_paper("selfVAE paper", "3.2c", "3.2e")
                                | of_paper("Salimans & Kingma 2016", "2"))


def test_all_equations_are_on_the_map():
    """The numbered ones of both papers, and the displays without a number."""
    wanted = of_paper("selfVAE paper", "1", "2") | of_paper("DC-VAE paper", *"123456789")
    displays = {"2.1": 1, "2.2": 2, "3.2": 8, "3.3": 7, "3.4": 1, "A.2": 1, "A.4": 5}
    for section, count in displays.items():
        for letter in "abcdefgh"[:count]:
            wanted.add(("selfVAE paper", f"{section}{letter}"))
    assert wanted <= set(equation_map())


def test_functions_on_the_map_name_their_equations():
    """Each function exists and carries the tag.

    Each row but that of the prior not taken has a function and a test.
    """
    for (paper, number), (functions, tests) in equation_map().items():
        assert (functions and tests) or number == "A.2a", number
        assert set(tests) <= TESTS, set(tests) - TESTS
        for file, name in functions:
            assert definition(SOURCES[file], name), f"{file}: {name}"
            text = "\n".join(lines_of(SOURCES[file], name))
            named = tags(text, PAPERS.get(file))
            assert (paper, number) in named, f"{file}: {name} does not name Eq. ({number})"


def first_line(node):
    """The number of a definition's first line, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno] + [decorator.lineno for decorator in decorators])


def functions_of(node):
    """[(name, node)] of a function, or of a class's methods; else []."""
    if isinstance(node, ast.FunctionDef):
        return [(node.name, node)]
    found = []
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                found.append((f"{node.name}.{item.name}", item))
    return found


def blocks(file):
    """[(name, text)] of a file: its functions and methods, and "" for what is between them.

    Copies are left out: their original is looked at.
    """
    lines = SOURCES[file].splitlines()
    found = []
    taken = set()
    for node in ast.parse(SOURCES[file]).body:
        first = first_line(node)
        mark = MARK.match(lines[first - 2])
        if mark and mark[1] == "Copied":
            taken |= set(range(first, node.end_lineno + 1))
            continue
        for name, item in functions_of(node):
            found.append((name, "\n".join(lines[item.lineno - 1:item.end_lineno])))
            taken |= set(range(item.lineno, item.end_lineno + 1))
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            rest = [i for i in range(node.lineno, node.end_lineno + 1) if i not in taken]
            found.append((node.name, "\n".join(lines[i - 1] for i in rest)))
            taken |= set(rest)
    rest = [line for i, line in enumerate(lines, 1) if i not in taken]
    return [*found, ("", "\n".join(rest))]


@pytest.mark.parametrize("file", SOURCES)
def test_equations_named_in_the_code_are_on_the_map(file):
    """A function that names one, other than in a NOTE(paper), stands in its row, or its class."""
    known = equation_map()
    for name, text in blocks(file):
        where = f"{file}: {name}"
        assert not re.search(r"\bEqs?\. ?\d", text), f"{where}: numbers stand in parentheses"
        named = tags(text, PAPERS.get(file))
        assert named <= set(known), (where, named - set(known))
        if not name:
            continue
        without_notes = re.sub(r"NOTE\(paper\).*(\n +# .*)*", "", text)
        owner = name.split(".")[0]
        for key in tags(without_notes, PAPERS.get(file)):
            functions, _ = known[key]
            listed = (file, name) in functions or (file, owner) in functions
            assert listed, f"{where} names Eq. {key}, whose row does not name it"


# ---- Math ----------------------------------------------------------------------------------------

# No \\, \, or \_: Markdown takes their backslash.
MACROS = set("""
    alpha beta delta varepsilon theta lambda mu pi sigma Sigma tau varphi nabla partial log exp ln
    sin cos tanh max min det frac sqrt sum int prod left right big underbrace lVert rVert Vert lvert
    rvert mid ge le lt gt approx propto to sim in cdot circ times ast infty ldots dots cdots lfloor
    rfloor tilde hat mathrm mathtt quad qquad mathbb begin end eta nu leftarrow""".split())


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
            opens = not before or before[-1] in " (|[\""
            assert opens, f"${inside}$ follows a letter: {line}"
            closes = not after or after[0] in " ).,;:|?!\"'-]" or after.startswith("**")
            assert closes, f"${inside}$ is followed by {after[0]}: {line}"
            cuts = line.startswith("|") and re.search(r"(?<!\\)\|", inside)
            assert not cuts, f"| ends a table's cell: {line}"
            found.append(inside)
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_math_is_well_formed(page):
    for formula in formulas(TEXTS[page]):
        in_a_block = f"```math\n{formula}\n```" in TEXTS[page]
        allowed = MACROS | {"\\"} if in_a_block else MACROS
        assert set(re.findall(r"\\([A-Za-z]+|.)", formula)) <= allowed, formula
        assert len(re.findall(r"\\left(?!arrow)", formula)) == formula.count(r"\right"), formula
        assert formula.count(r"\begin") == formula.count(r"\end"), formula
        assert "<" not in formula and ">" not in formula, f"Markdown takes < for a tag: {formula}"
        depth = 0
        for bracket in re.findall(r"(?<!\\)[{}]", formula):
            depth += 1 if bracket == "{" else -1
            assert depth >= 0, formula
        assert depth == 0, formula


GREEK = re.compile(r"\\(alpha|beta|delta|varepsilon|eta|theta|lambda|mu|nu|pi|sigma|Sigma|tau"
                   r"|varphi)(?![A-Za-z])")


def symbols(formula):
    """The letters and Greek macros of a formula, words and functions left out."""
    formula = re.sub(r"\\(mathrm|mathtt|mathbb|begin|end)\s*\{[^}]*\}", " ", formula)
    letters = re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", formula))
    return set(GREEK.findall(formula)) | set(letters)


def symbol_rows():
    """The one table of symbols -> [(its symbols, its pages or "all", the first cell)]."""
    table = TEXTS["equations.md"].split("## 1. Symbols")[1].split("## 2.")[0]
    rows = []
    for line in table.splitlines():
        if line.startswith("| $"):
            cells = re.split(r" *\| *", line)[1:-1]
            assert len(cells) == 5, line
            named = set()
            for formula in re.findall(r"\$([^$]+)\$", cells[0]):
                named |= symbols(formula)
            rows.append((named, set(re.split("[,;] ", cells[3])), cells[0]))
    return rows


def test_every_symbol_is_in_the_one_table():
    """Each letter of a formula on a derivation's page stands in a row for that page.

    On the other pages in any row.
    """
    rows = symbol_rows()
    names = {page.removesuffix(".md") for page in TEXTS}
    for page, text in TEXTS.items():
        known = set("deT")  # d a differential, e Euler's number, T a transpose
        for named, pages, _ in rows:
            assert pages <= names | {"all"}, pages
            if page not in DERIVATIONS or {"all", page.removesuffix(".md")} & pages:
                known |= named
        for formula in formulas(text):
            assert symbols(formula) <= known, (page, formula, symbols(formula) - known)


def test_no_symbol_is_for_a_page_without_it():
    for named, pages, cell in symbol_rows():
        for page in pages - {"all"}:
            text = TEXTS[f"{page}.md"]
            used = set(re.findall(r"(?<![\w*])[A-Za-z](?!\w)", text))
            for formula in formulas(text):
                used |= symbols(formula)
            assert named & used, (page, cell)


# ---- Links and figures ---------------------------------------------------------------------------

def anchors(text):
    """The anchors that a Git host makes of a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("docs/**/README.md")],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        text = target.read_text(encoding="utf-8") if anchor else ""
        assert not anchor or anchor in anchors(text), f"{page.name}: {link}"


def test_the_index_has_every_page():
    """Of docs/, and of its lab every program."""
    text = INDEX.read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"({page.name})" in text
    text = (ROOT / "docs" / "lab" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "lab").glob("*.py"):
        assert f"({path.name})" in text


@pytest.mark.parametrize("page", TEXTS)
def test_sections_that_are_referred_to_exist(page):
    """`[page.md](page.md), section 3` and `sections 3 to 6`: that page has such a heading.

    And so has this one, for `(section 3)`.
    """
    found = re.findall(r"\]\((?:docs/)?(\w+\.md)\), "
                       r"sections? ((?:\d+(?!\.\d)(?:, | to | and )?)+)", TEXTS[page])
    for number in re.findall(r"\(section (\d+)\)", TEXTS[page]):
        found.append((page, number))
    for target, numbers in found:
        for number in re.findall(r"\d+", numbers):
            there = re.search(rf"^## {number}\. ", TEXTS[target], re.M)
            assert there, f"{page}: {target}, section {number}"


def made_by(picture, section):
    """Whether a section has the command that made a picture.

    `script-what-….png` is made by a run of that script on `what`; others by their own name.
    """
    script, what, *_ = [*picture.removesuffix(".png").split("-"), ""]
    if script not in MODELS:
        drawn = re.search(rf"python docs/lab/(figures|benchmark)\.py {script}\b", section)
        by_code = re.search(rf"```python(?:(?!```).)*{script}\.png", section, re.S)
        return bool(drawn or by_code)
    if picture.endswith("-losses.png") and "python docs/lab/four_losses.py" not in section:
        return False
    for name, words in commands(section):
        if name == script and (what in words or what == "shapes"):
            return True
    return False


def test_figures_are_small_and_have_their_command():
    """Every PNG is shown in the docs, and where it is shown stands a command that made it."""
    shown = set()
    for page, text in TEXTS.items():
        for section in re.split(r"^## ", text, flags=re.M):
            pictures = set(re.findall(r"figures/([\w.-]+\.png)", section))
            shown |= pictures
            if page != "README.md":
                missing = [picture for picture in pictures if not made_by(picture, section)]
                assert not missing, f"{page}, {section.splitlines()[0]}: {missing}"
    files = {path.name: path for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert shown == set(files)
    for name, path in files.items():
        assert path.stat().st_size < 300_000, name
        assert matplotlib.image.imread(path).std() > 0.01, f"{name} is blank"


def test_figures_can_be_drawn(tmp_path, monkeypatch, tiny_data, capsys):
    """docs/lab/figures.py: those that take a second, and, on a few grey shapes, that which trains.

    A run of another script is refused.
    """
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    (tmp_path / "mnist-32").mkdir()
    for split in ("train", "test"):
        images = np.load(tiny_data / "shapes-32" / f"{split}.npy")[..., :1]
        labels = np.zeros(len(images), np.uint8)
        np.save(tmp_path / "mnist-32" / f"{split}.npy", images)
        np.save(tmp_path / "mnist-32" / f"{split}-labels.npy", labels)
    figures.levels()
    figures.mixture()
    figures.holes(tmp_path, 2)
    for name in ("levels", "mixture", "holes"):
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.05, name
    assert re.search(r"flow: validation, .* re \d+\.\d \+ kl \d+\.\d\d = \d+\.\d\n"
                     r" +KL\(q\(z\) \|\| p\(z\)\) ", capsys.readouterr().out)
    torch.save({"script": "realnvp"}, tmp_path / "best.pt")
    with pytest.raises(SystemExit, match="takes one of vae.py"):
        figures.tighten(tmp_path)


@pytest.mark.parametrize("name, other, rows", [
    ("given", "posterize", 5), ("exact", "downscale", 6)])
def test_figures_of_x_given_y(name, other, rows, tmp_path, monkeypatch, tiny_data):
    """x once, then for every run y, draws of x given y and, of the exact one, what d misses."""
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    narrow_networks(monkeypatch)
    runs = []
    for i, transform in enumerate(("downscale", other)):
        exact = name == "exact" and i == 0
        cfg = figures.selfvae.Config(transform=transform, exact=exact, small=True, size=16)
        model = figures.selfvae.SelfVAE(cfg, (3, 16, 16))
        runs.append(tmp_path / str(i))
        runs[-1].mkdir()
        torch.save({"config": dataclasses.asdict(cfg), "model": model.state_dict()},
                   runs[-1] / "best.pt")
    draw = getattr(figures, name)
    draw(*runs, data_dir=tiny_data)
    pictures = pictures_on(tmp_path / f"{name}.png", 16)
    assert len(pictures) == rows
    x = np.load(tiny_data / "shapes-16" / "test.npy")[:8]
    y = from_pixels(x)
    assert np.array_equal(pictures[0], x)
    assert np.array_equal(pictures[1][:, ::2, ::2], y)
    draws = pictures[2]
    if name == "exact":
        assert np.array_equal(from_pixels(draws), y) and not pictures[3].any()


def test_a_row_of_a_sheet(tmp_path):
    """What docs/lab takes from a run's sheets is the pictures that were put there."""
    figures = importlib.import_module("figures")
    images = common.quantize(2 * torch.rand(16, 3, 16, 16) - 1)
    common.save_sheet(tmp_path / "sheet.png", "t", {"x": images})
    for i in (0, 1):
        row = figures.row_of_sheet(tmp_path / "sheet.png", 16, i)
        assert torch.allclose(row, images[8 * i:8 * i + 8])
    with pytest.raises(SystemExit, match="no sheet"):
        figures.row_of_sheet(tmp_path / "sheet.png", 24)


def from_pixels(x):
    """d of downscaling: uint8 (N, 2h, 2w, C) -> (N, h, w, C)."""
    blocks = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).astype(int)
    return (blocks.sum((2, 4)) + 2) // 4


# ---- Code blocks and numeric examples ------------------------------------------------------------

@pytest.mark.parametrize("page", TEXTS)
def test_code_blocks_fit_in_100_columns(page):
    for block in re.findall(r"^```\w*\n(.*?)^```", TEXTS[page], re.M | re.S):
        for line in block.splitlines():
            assert len(line) <= 100, line


EXAMPLE = re.compile(r"^```python\n((?:(?!^```).)*)^```\n\n^```\n((?:(?!^```).)*)^```\n*",
                     re.M | re.S)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]\d+)?")


def tolerance(number):
    """Two units of the last digit of a number as it is printed; 0 for an integer."""
    if "." not in number:
        return 0
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 2.01 * 10.0 ** (int(exponent or 0) - decimals)


def alike(printed, expected):
    """Two texts with the same words, whose numbers differ by their `tolerance` at most.

    Another machine may round otherwise.
    """
    if NUMBER.sub("#", printed) != NUMBER.sub("#", expected):
        return False
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(expected)):
        if abs(float(ours) - float(theirs)) > tolerance(theirs):
            return False
    return True


def test_alike():
    assert alike("S = 4  gap 0.123", "S = 4  gap 0.122")
    assert not alike("S = 4  gap 0.129", "S = 4  gap 0.122")
    assert not alike("S = 5  gap 0.122", "S = 4  gap 0.122")
    assert not alike("a 1.0", "b 1.0")
    assert not alike("1.0", "1.0 2.0")
    assert alike("1.2e-05", "1.3e-05")
    assert not alike("1.2e-05", "1.2e-04")


@pytest.mark.parametrize("page", DERIVATIONS)
def test_numeric_example(page):
    """The last section of a derivation is code and what it prints."""
    ((code, expected),) = EXAMPLE.findall(TEXTS[page].split("\n## ")[-1])
    assert TEXTS[page].rstrip().endswith("```")
    assert len(code.splitlines()) <= 35
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    assert alike(printed.getvalue(), expected), printed.getvalue()


# ---- Commands: all parse (test_agreements), the cheap ones are run -------------------------------

GO_ON = {"--resume", "--eval"}  # these need a run that is there


def cheap_commands():
    """README's commands that need no download -> those that start a run, those that go on."""
    first = set()
    later = set()
    for script, words in commands(TEXTS["README.md"]):
        if script in MODELS and not {*words} & {"cifar10", "imagenette", "--fid"}:
            (later if GO_ON & {*words} else first).add((script, *words))
    return sorted(first), sorted(later)


CHEAP, CHEAP_GO_ON = cheap_commands()


@pytest.mark.parametrize("line", CHEAP, ids=" ".join)
def test_commands_of_the_readme_run(line, tiny_data, tmp_path, monkeypatch):
    """As printed but for their length: two steps, on tiny data."""
    cut_short(monkeypatch)
    script, *words = line
    short = {"batch_size": 500} if "moons" in words else {}
    assert call(script, [*words, *flags_for(script, tiny_data, tmp_path, **short)]) == 0


@pytest.fixture(scope="module")
def first_runs(tiny_data, tmp_path_factory):
    """A folder with a run of two steps, "first", of each script that a command goes on with."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        for script in sorted({script for script, *_ in CHEAP_GO_ON}):
            patch.setattr(f"{script}.save_figures", nothing)
            patch.setattr(f"{script}.evaluate", nothing)
            assert call(script, flags_for(script, tiny_data, folder / script, name="first")) == 0
    return folder


@pytest.mark.parametrize("line", CHEAP_GO_ON, ids=" ".join)
def test_commands_of_the_readme_go_on(line, first_runs, tmp_path, monkeypatch):
    """After a run of two steps, as printed, but for where it is kept and the number of steps.

    Flags of that run that are not printed follow from its checkpoint.
    """
    cut_short(monkeypatch)
    narrow_networks(monkeypatch)
    script, *words = line
    shutil.copytree(first_runs / script / "first", tmp_path / "first")
    here = ["--out_dir", str(tmp_path), "--name", "first", "--steps", "3"]
    assert call(script, [*words, *here]) == 0
    log = (tmp_path / "first" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = 3 if "--resume" in words else 2
    assert json.loads(log[-1])["step"] == wanted


def test_the_cheap_ones_are_some():
    assert {script for script, *_ in CHEAP} >= {"selfvae", "realnvp"}
    assert any("--help" in line for line in CHEAP)
    assert any("--resume" in line for line in CHEAP_GO_ON)
    assert any("--eval" in line for line in CHEAP_GO_ON)


# ---- Trained weights -----------------------------------------------------------------------------

WEIGHTS = sorted((ROOT / "docs" / "models").glob("*/best.pt"))


@pytest.mark.parametrize("path", WEIGHTS, ids=[path.parent.name for path in WEIGHTS])
def test_trained_weights_are_a_model_of_today(path):
    """Small, with no optimizer, and what a script makes of its flags; the bound is a trained one.

    An untrained model has some 7 bits per dimension; here it is of noise, so of shapes alone.
    """
    assert path.stat().st_size < 3.7e6
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint.keys() == {"script", "config", "state", "model"}
    module = importlib.import_module(checkpoint["script"])
    cfg = module.Config(**checkpoint["config"])
    size = cfg.size or common.DATASETS[cfg.dataset][0]
    shape = (1 if cfg.dataset == "mnist" else 3, size, size)
    model = getattr(module, MODELS[checkpoint["script"]])(cfg, shape).eval()
    model.load_state_dict(checkpoint["model"])
    if cfg.dataset == "shapes":
        pixels, _ = common.make_shapes(8, size, seed=1)
        x = common.from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        with torch.no_grad():
            nats = -model.elbo(x).mean().item()
        assert common.bits_per_dim(nats, 3 * size**2) < 4.5


# ---- Exercises -----------------------------------------------------------------------------------

DURATIONS = r".* \((an hour|two hours|half a day|a day|two days|a week)\)\n"


def test_exercises_are_complete():
    """Some twelve, numbered from 1.

    Each with how long it takes, functions that have docstrings, tests, an equation, a hint,
    something to look at.
    """
    page = TEXTS["exercises.md"]
    assert list(exercises()) == list(range(1, len(exercises()) + 1))
    assert len(exercises()) >= 12
    for number, (functions, tests) in exercises().items():
        text = page.split(f"\n## Exercise {number}: ")[1].split("\n## ")[0]
        assert functions and tests, number
        assert set(tests) <= TESTS, set(tests) - TESTS
        assert re.match(DURATIONS, text), number
        for part in ("Equation", "Hint", "Look at"):
            assert re.search(rf"- \*\*{part}\*\* \S.{{20}}", text), (number, part)
        equations = re.search(r"\*\*Equation\*\* (.*)", text)[1]
        assert tags(equations, None) <= set(equation_map()), number
        assert "Eq" in equations or "](" in equations, number
        for file, name in functions:
            assert ast.get_docstring(definition(PYTHON[file], name)), (file, name)


def test_exercises_are_graded(grades):
    """In a copy of the tree without exercises n, n + 1, … all tests of n fail.

    Where n is there and n + 1, … are not, all pass; and if one of an exercise's functions is
    missing, some fail. `-k exercise_n` selects these tests and no others.
    """
    tests = {}
    for n, (_, graders) in exercises().items():
        tests[n] = {": ".join(grader) for grader in graders}
    wrong = []
    for (without, numbers), outcomes in zip(trees(), json.loads(grades())):
        missing = dict(without)
        numbers = [n for n in numbers if n in tests]
        wanted_tests = set()
        for n in numbers:
            wanted_tests |= tests[n]
        assert set(outcomes) == wanted_tests, numbers
        for n in numbers:
            functions, _ = exercises()[n]
            one_of_several = len(missing) == 1 and missing.get(n, functions) != functions
            if one_of_several:
                if not any("failed" in outcomes[name] for name in tests[n]):
                    wrong.append(f"exercise {n} is graded right without {missing[n]}")
                continue
            wanted = ["failed"] if n in missing else ["passed"]
            for name in sorted(tests[n]):
                if outcomes[name] != wanted:
                    wrong.append(f"without {list(missing)}, {name} of exercise {n} is "
                                 f"{outcomes[name]}")
    assert wrong == []


def test_an_emptied_function_keeps_its_docstring():
    source = ('class A:\n'
              '    def f(self):\n'
              '        """Doc."""\n'
              '        # how\n'
              '        return 1\n'
              '\n'
              '    def g(self, x):\n'
              '        return x\n')
    raised = "raise NotImplementedError('m')"
    assert emptied(source, "A.f", "m") == source.replace("# how\n        return 1", raised)
    assert emptied(source, "A.g", "m") == source.replace("return x", raised)


def test_exercises_are_emptied_and_put_back(tmp_path):
    """The command line, in a repository of its own.

    Nothing that somebody wrote is overwritten, and a solution brings back its functions alone.
    """
    (tmp_path / "docs").mkdir()
    for file in ("common.py", "selfvae.py", "docs/exercises.py", "docs/exercises.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    path = tmp_path / "common.py"
    ours = path.read_text(encoding="utf-8")

    def shell(line):
        line = line.replace("python", sys.executable)
        return subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, encoding="utf-8")

    def emptied_functions():
        return path.read_text(encoding="utf-8").count("raise NotImplementedError")

    committed = shell("git init -q && git add . && "
                      "git -c user.name=a -c user.email=a commit -qm one")
    assert committed.returncode == 0
    assert shell("python docs/exercises.py 1 4").returncode == 0
    assert emptied_functions() == 3  # exercise 4 has two here, and one in selfvae.py
    raised = "raise NotImplementedError('exercise 1: log_mean_exp')"
    mine = path.read_text(encoding="utf-8").replace(raised, "return 'mine'")
    path.write_text(mine, encoding="utf-8")
    refused = shell("python docs/exercises.py 1")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1 and "log_mean_exp" in refused.stderr
    assert path.read_text(encoding="utf-8") == mine
    assert shell("python docs/exercises.py 4 --solution").returncode == 0
    assert emptied_functions() == 0
    assert "return 'mine'" in path.read_text(encoding="utf-8")
    assert shell("python docs/exercises.py 1 --solution").returncode == 0
    assert path.read_text(encoding="utf-8") == ours
    for words, told in (("99", "--solution"), ("", "--solution"), ("1 2", "realnvp.py")):
        refused = shell(f"python docs/exercises.py {words}")
        assert refused.returncode == 2 and told in refused.stderr
        # 2 is of a file that is not here: 1 is left alone too.
        assert path.read_text(encoding="utf-8") == ours
    path.write_text(ours.replace("def log_mean_exp(", "def log_mean_exp(("), encoding="utf-8")
    refused = shell("python docs/exercises.py 1 --solution")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
