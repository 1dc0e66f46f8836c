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
import figures
import longruns
from conftest import (
    MODELS, ROOT, SCRIPTS, call, flags_for, narrow_networks, pictures_on, save_untrained)
from exercises import definition, exercises, lines_of, trees
from test_agreements import BLOCK, INDEX, PAGES, PYTHON, SOURCES, TEXTS, commands, definitions
from test_runs import cut_short, records
from two_processes import nothing

RUNS = ROOT / "docs" / "lab" / "runs.md"
DERIVATIONS = ["vae.md", "realnvp.md", "selfvae.md", "dcvae.md", "likelihood.md", "evaluation.md"]


def test_rows_of_the_results_are_those_of_the_runs(capsys):
    """Else a number in lab/runs.md was typed by hand, or is of another run than docs/lab/logs."""
    longruns.main("table")
    printed = capsys.readouterr().out.splitlines()
    shown = []
    for line in RUNS.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and line.split()[1] in longruns.COMMANDS:
            shown.append(line)
    rows = [line for line in printed if line.startswith("| ") and not line.startswith("| run ")]
    assert sorted(rows) == sorted(shown)


def test_a_row_has_the_best_validation():
    """That is what best.pt is, and so what was evaluated."""
    results = {"step": 2, "elbo_bpd": 3.1, "iw_bpd": 3.0, "iw_bpd_se": 0.1, "iw_elbo_bpd": 3.1,
               "parameters": 5}
    log = [{"split": split, "bpd": bpd} for split, bpd in
           (("train", 2.0), ("valid", 3.2), ("valid", 4.0))]
    assert longruns.row_of_bounds(results, log)[:3] == ["2", "3.200", "3.100"]


# ---- Numbers -------------------------------------------------------------------------------------

# What the papers report and our pages quote.
QUOTED = {"3.24", "3.49", "3.51", "3.65", "3.70", "3.85", "46", "17.9", "21.4"}
LOGS = ROOT / "docs" / "lab" / "logs"


def results():
    """{run: what docs/lab/logs has of it, and "minutes": of a core, else of training}."""
    found = {}
    for path in LOGS.glob("*-results.json"):
        of_run = json.loads(path.read_text(encoding="utf-8"))
        of_run["minutes"] = of_run.get("core_minutes", of_run["train_seconds"] / 60)
        found[path.name.removesuffix("-results.json")] = of_run
    return found


def is_rounded(text, value):
    """Whether "3.65" is `value`, rounded to as many digits."""
    digits = len(text.partition(".")[2])
    return isinstance(value, (int, float)) and f"{value:.{digits}f}" == text


def rows_of(section):
    """The cells of a section's table rows, without bold type."""
    for line in section.splitlines():
        if line.startswith("| "):
            yield [cell.strip().replace("**", "") for cell in line.strip("| ").split(" | ")]


def test_readme_table_is_of_the_runs():
    """A row's bits, or squared error, and its minutes are of one run; † is of an earlier commit."""
    section = TEXTS["README.md"].split("## What we found")[1].split("\n## ")[0]
    rows = [cells for cells in rows_of(section) if cells[-1] in QUOTED]
    assert len(rows) == 5
    for _, _, minutes, here, _ in rows:
        if "†" in here:
            continue
        right = []
        for run, of_run in results().items():
            value = of_run.get("elbo_bpd", of_run.get("pixel_distance"))
            if is_rounded(here, value) and is_rounded(minutes, of_run["minutes"]):
                right.append(run)
        assert right, (minutes, here)


def test_results_table_is_of_the_runs():
    """The run that a row names has its number and its minutes."""
    section = TEXTS["results.md"].split("## Ten rows")[1].split("\n## ")[0]
    of_runs = results()
    named = 0
    for _, here, minutes, run in rows_of(section):
        if "†" not in here and run in of_runs:
            value = of_runs[run].get("elbo_bpd", of_runs[run].get("pixel_distance"))
            assert is_rounded(here.split()[0], value), (run, here)
            assert is_rounded(minutes, of_runs[run]["minutes"]), (run, minutes)
            named += 1
    assert named >= 3


CLAIM = re.compile(r"(\d+\.\d+)(†?) (?:bits\s+per\s+dimension|bpd)|FID,? (?:of )?(\d+\.\d+)")


@pytest.mark.parametrize("page", ["README.md", "running.md", *[f"{s}.py" for s in SCRIPTS]])
def test_a_number_is_of_a_run_or_of_a_paper(page):
    """Bits per dimension and FID in README, running.md and the docstrings at the scripts' heads."""
    text = TEXTS.get(page) or ast.get_docstring(ast.parse(SOURCES[page]))
    printed = [of_run.get("elbo_bpd") for of_run in results().values()]
    for bits, old, fid in CLAIM.findall(text):
        ours = any(is_rounded(bits, value) for value in printed)
        assert old or ours or (bits or fid) in QUOTED, (page, bits or fid)


def test_what_the_first_command_prints():
    """README shows lines of docs/lab/logs/first-command.txt."""
    (block,) = [lines for language, lines in BLOCK.findall(TEXTS["README.md"]) if not language]
    log = (LOGS / "first-command.txt").read_text(encoding="utf-8").splitlines()
    assert set(block.splitlines()) <= set(log)


# ---- Names ---------------------------------------------------------------------------------------

# Files of the papers' codes.
RELEASED = {"loss.py", "distributions.py", "srvae.py", "nn_layers.py", "train.py", "main.py",
            "plotting.py", "misc.py"}


@pytest.mark.parametrize("page", TEXTS)
def test_every_definition_named_in_the_docs_exists(page):
    """`file.py: name`, `file.py: Class.method`, or a constant there; `test_x.py: test_name`.

    Files that are none of ours are those of the released codes, on the page of errata. There, in
    equations.md and in exercises.md no mention of a test has another form.
    """
    text = TEXTS[page]
    tests = 0
    for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", text):
        if page == "errata.md" and file in RELEASED:
            continue
        is_test = file.startswith("test_")
        tests += is_test
        source = PYTHON[f"tests/{file}" if is_test else file]
        constant = re.search(rf"^{name}\b.* = ", source, re.M)
        assert definition(source, name) or constant, f"{file}: {name}"
    if page in ("errata.md", "equations.md", "exercises.md"):
        assert len(re.findall(r"(?<!tests/)\btest_", text)) == 2 * tests > 0


# Flags of programs that are none of the four scripts.
OTHERS = {"nproc_per_node", "solution", "img_size", "bottom_width"}


def test_every_flag_named_in_the_docs_exists():
    """Also those that stand in a sentence."""
    known = OTHERS | {"help"}
    for script in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(script).Config):
            known |= {field.name, f"no-{field.name}"} if field.type is bool else {field.name}
    for page, text in TEXTS.items():
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
    stem = first[:-1] if first[-1].isalpha() else ""
    numbers = [f"{stem}{end}" for end in [*range(1, 20), *"abcdefgh"]]
    return numbers[numbers.index(first) + 1:numbers.index(last)]


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
        found |= {(source or paper, number) for number in numbers}
    return found


def equation_map():
    """docs/equations.md, sections 2 to 5.

    -> {(paper, number): ([(file, function)], its tests)}.
    """
    rows = {}
    for section in re.split(r"^## ", TEXTS["equations.md"], flags=re.M)[2:]:
        for line in section.splitlines():
            cells = line.strip("|").split(" | ")
            if not line.startswith("|") or "Eq." not in cells[0]:
                continue
            assert len(cells) == 5, line
            (key,) = tags(cells[0], SECTIONS.get(section[0]))
            assert key not in rows and key[0], line
            rows[key] = re.findall(r"`(\w+\.py): ([\w.]+)`", cells[3]), "test_" in cells[4]
    return rows


def of_paper(paper, *numbers):
    """-> {(paper, number)}."""
    return {(paper, number) for number in numbers}


def test_tags_are_read():
    text = ("x (Eq. (2)), Burda et al. 2015, Eq. (8); Eqs. (3.3c) to (3.3e), (A.4a), "
            "and Eqs. (9) to (11), Dinh et al. 2016, Eqs. (4), by masks Eq. (9), in the selfVAE "
            "paper,\n    # Eqs. (3.2c), (3.2e), and Salimans & Kingma 2016, Eq. (2)")
    assert tags(text, "P") == (
        of_paper("P", "2", "3.3c", "3.3d", "3.3e", "A.4a", "9", "10", "11")
        | of_paper("Burda et al. 2015", "8") | of_paper("Dinh et al. 2016", "4", "9")
        | of_paper("selfVAE paper", "3.2c", "3.2e") | of_paper("Salimans & Kingma 2016", "2"))


def test_all_equations_are_on_the_map():
    """The numbered ones of both papers, and the displays without a number."""
    wanted = of_paper("selfVAE paper", "1", "2") | of_paper("DC-VAE paper", *"123456789")
    displays = {"2.1": 1, "2.2": 2, "3.2": 8, "3.3": 7, "3.4": 1, "A.2": 1, "A.4": 5}
    for section, count in displays.items():
        for letter in "abcdefgh"[:count]:
            wanted.add(("selfVAE paper", f"{section}{letter}"))
    assert wanted <= set(equation_map())


def test_functions_on_the_map_name_their_equations():
    """Each row but that of the prior not taken has a function and a test."""
    for (paper, number), (functions, tested) in equation_map().items():
        assert (functions and tested) or number == "A.2a", number
        for file, name in functions:
            named = tags("\n".join(lines_of(SOURCES[file], name)), PAPERS.get(file))
            assert (paper, number) in named, f"{file}: {name} does not name Eq. ({number})"


def parts_of(file):
    """{name: text} of a file: its functions, methods, classes, and "" for what is between them.

    A text is without the parts inside. Copies are left out: their original is looked at.
    """
    rest = SOURCES[file]
    found = {}
    for name, (text, mark) in definitions(rest).items():
        whole = definition(text, name)
        if not whole:  # a constant
            continue
        rest = rest.replace(text, "")
        if mark and mark[1] == "Copied":
            continue
        methods = {}
        for node in whole.body:
            if isinstance(node, ast.FunctionDef):
                method = f"{name}.{node.name}"
                methods[method] = "\n".join(lines_of(text, method))
        for part in methods.values():
            text = text.replace(part, "")
        found |= methods | {name: text}
    return found | {"": rest}


@pytest.mark.parametrize("file", SOURCES)
def test_equations_named_in_the_code_are_on_the_map(file):
    """A function that names one, other than in a NOTE(paper), stands in its row, or its class."""
    known = equation_map()
    for name, text in parts_of(file).items():
        where = f"{file}: {name}"
        assert not re.search(r"\bEqs?\. ?\d", text), f"{where}: numbers stand in parentheses"
        named = tags(text, PAPERS.get(file))
        assert named <= set(known), (where, named - set(known))
        without_notes = re.sub(r"NOTE\(paper\).*(\n +# .*)*", "", text)
        if name in ("", "Config"):
            continue
        for key in tags(without_notes, PAPERS.get(file)):
            functions, _ = known[key]
            listed = {(file, name), (file, name.split(".")[0])} & set(functions)
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
    found = [code for language, code in BLOCK.findall(text) if language == "math"]
    text = re.sub(r"`[^`\n]*`", "CODE", BLOCK.sub("", text))
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
        allowed = MACROS | {"\\"} if formula.endswith("\n") else MACROS  # in a block
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
            named = symbols(" ".join(re.findall(r"\$([^$]+)\$", cells[0])))
            rows.append((named, set(re.split("[,;] ", cells[3])), cells[0]))
    return rows


def test_every_symbol_is_in_the_one_table():
    """Each letter of a formula on a derivation's page stands in a row for that page.

    On the other pages in any row.
    """
    for page, text in TEXTS.items():
        known = set("deT")  # d a differential, e Euler's number, T a transpose
        for named, pages, _ in symbol_rows():
            if page not in DERIVATIONS or {"all", page.removesuffix(".md")} & pages:
                known |= named
        for formula in formulas(text):
            assert symbols(formula) <= known, (page, formula, symbols(formula) - known)


def test_no_symbol_is_for_a_page_without_it():
    for named, pages, cell in symbol_rows():
        for page in pages - {"all"}:
            text = TEXTS[f"{page}.md"]
            used = set(re.findall(r"(?<![\w*])[A-Za-z](?!\w)", text))
            used |= symbols(" ".join(formulas(text)))
            assert named & used, (page, cell)


# ---- Links and figures ---------------------------------------------------------------------------

def anchors(text):
    """The anchors that a Git host makes of a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [*PAGES, INDEX, *ROOT.glob("docs/*/*.md")],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_index_has_every_page():
    """Of docs/, and of its lab every program."""
    for index, files in ((INDEX, PAGES[1:]),
                         (ROOT / "docs" / "lab" / "README.md", ROOT.glob("docs/lab/*.py"))):
        text = index.read_text(encoding="utf-8")
        for path in files:
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
        return drawn or any(f"{script}.png" in code for _, code in BLOCK.findall(section))
    if picture.endswith("-losses.png") and "python docs/lab/four_losses.py" not in section:
        return False
    for name, words in commands(section):
        if name == script and what in (*words, "shapes"):
            return True
    return False


def test_figures_are_small_and_have_their_command():
    """Every PNG is shown in the docs, and where it is shown stands a command that made it."""
    shown = set()
    for page, text in {**TEXTS, "runs.md": RUNS.read_text(encoding="utf-8")}.items():
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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where docs/lab/figures.py draws; of narrow networks."""
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    narrow_networks(monkeypatch)
    return tmp_path


def test_figures_can_be_drawn(folder, tiny_data):
    """Those that take a second, and, on a few grey shapes, that which trains.

    A run of another script is refused.
    """
    (folder / "mnist-32").mkdir()
    for split in ("train", "test"):
        images = np.load(tiny_data / "shapes-32" / f"{split}.npy")[..., :1]
        np.save(folder / "mnist-32" / f"{split}.npy", images)
        np.save(folder / "mnist-32" / f"{split}-labels.npy", np.zeros(len(images), np.uint8))
    figures.levels()
    figures.mixture()
    figures.growth()
    figures.holes(folder, 2)
    for name in ("levels", "mixture", "growth", "holes"):
        assert matplotlib.image.imread(folder / f"{name}.png").std() > 0.05, name
    with pytest.raises(SystemExit, match="takes one of vae.py"):
        figures.tighten(save_untrained(folder, "realnvp"))


@pytest.mark.parametrize("draw, other, rows", [
    (figures.given, "posterize", 5), (figures.exact, "downscale", 6)])
def test_figures_of_x_given_y(draw, other, rows, folder, tiny_data):
    """x once, then for every run y, draws of x given y and, of the exact one, what d misses."""
    exact = draw == figures.exact
    runs = []
    for name, flags in (("a", dict(exact=exact)), ("b", dict(transform=other))):
        runs.append(save_untrained(folder / name, "selfvae", **flags))
    draw(*runs, data_dir=tiny_data)
    pictures = pictures_on(folder / f"{draw.__name__}.png", 16)
    assert len(pictures) == rows
    x = np.load(tiny_data / "shapes-16" / "test.npy")[:8]
    assert np.array_equal(pictures[0], x)
    assert np.array_equal(pictures[1][:, ::2, ::2], halved(x))
    if exact:
        assert np.array_equal(halved(pictures[2]), halved(x)) and not pictures[3].any()


def test_the_heros_rows(folder, tiny_data):
    """Four photographs, half their size, bicubic, and a draw whose halves are the same."""
    run = save_untrained(folder / "a", "selfvae", exact=True, data_dir=str(tiny_data))
    figures.hero(run, data_dir=tiny_data)
    rows = pictures_on(folder / "hero.png", 32, columns=4)
    x, y, bicubic, draw = rows[:, :, ::2, ::2]
    assert np.array_equal(x, np.load(tiny_data / "shapes-16" / "test.npy")[:4])
    assert np.array_equal(y[:, ::2, ::2], halved(x)) and np.array_equal(halved(draw), halved(x))
    assert not np.array_equal(bicubic, draw)


def test_figure_of_a_stack(folder, tiny_data):
    """It takes a run of vae.py with --prior normal and no other."""
    for prior in ("realnvp", "normal"):
        run = save_untrained(folder / prior, "vae", prior=prior, data_dir=str(tiny_data))
        if prior == "normal":
            figures.stack(run)
        else:
            with pytest.raises(SystemExit, match="--prior normal"):
                figures.stack(run)
    assert matplotlib.image.imread(folder / "stack.png").std() > 0.05


def test_figure_of_enlarged_images(folder, tiny_data):
    """Each y_k above images that have it, as an exact model's have; then x."""
    run = save_untrained(folder / "a", "selfvae", size=32, levels=2, exact=True)
    figures.enlarge(run, data_dir=tiny_data)
    y_1, from_y_1, y_2, from_y_2, x = pictures_on(folder / "enlarge.png", 32)
    assert np.array_equal(x, np.load(tiny_data / "shapes-32" / "test.npy")[:8])
    assert np.array_equal(y_2[:, ::2, ::2], halved(x))
    assert np.array_equal(halved(from_y_2), halved(x)) and not np.array_equal(from_y_2, x)
    assert np.array_equal(y_1[:, ::4, ::4], halved(halved(x)))
    assert np.array_equal(halved(halved(from_y_1)), halved(halved(x)))
    assert not np.array_equal(halved(from_y_1), halved(x))


def halved(x):
    """d of downscaling: uint8 (N, 2h, 2w, C) -> (N, h, w, C)."""
    x = x.astype(int)
    rows = x[:, ::2] + x[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2] + 2) // 4


def test_a_row_of_a_sheet(tmp_path):
    """What docs/lab takes from a run's sheets is the pictures that were put there."""
    path = tmp_path / "sheet.png"
    images = common.quantize(2 * torch.rand(16, 3, 16, 16) - 1)
    common.save_sheet(path, "t", {"x": images})
    rows = torch.cat([figures.row_of_sheet(path, 16, i) for i in (0, 1)])
    assert torch.allclose(rows, images)
    with pytest.raises(SystemExit, match="no sheet"):
        figures.row_of_sheet(path, 24)


# ---- Numeric examples ----------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d+\.?(\d*)(?:e([+-]\d+))?")


def alike(printed, expected):
    """Two texts with the same words, whose numbers differ by two units of their last digit at most.

    Another machine may round otherwise. Integers are the same.
    """
    if NUMBER.sub("#", printed) != NUMBER.sub("#", expected):
        return False
    for ours, theirs in zip(NUMBER.finditer(printed), NUMBER.finditer(expected)):
        unit = 10.0 ** (int(theirs[2] or 0) - len(theirs[1])) if "." in theirs[0] else 0
        if abs(float(ours[0]) - float(theirs[0])) > 2.01 * unit:
            return False
    return True


def test_alike():
    assert alike("S = 4  gap 0.123, 1.2e-05", "S = 4  gap 0.122, 1.3e-05")
    for printed, expected in (("0.129", "0.122"), ("5", "4"), ("a 1.0", "1.0"),
                              ("1.2e-05", "1.2e-04")):
        assert not alike(printed, expected)


@pytest.mark.parametrize("page", DERIVATIONS)
def test_numeric_example(page):
    """A derivation ends with code and what it prints; what is to be looked up comes after that."""
    (section,) = re.findall(r"^## \d+\. A numeric example$(.*?)(?=^## |\Z)", TEXTS[page],
                            re.M | re.S)
    (_, code), (_, expected) = BLOCK.findall(section)
    assert len(code.splitlines()) <= 35
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    assert alike(printed.getvalue(), expected), printed.getvalue()


# ---- Commands: all parse (test_agreements), the cheap ones are run -------------------------------

def cheap_commands():
    """Commands of README and running.md that need no download: [(script, argument, …)]."""
    found = {}
    for script, words in commands(TEXTS["README.md"] + TEXTS["running.md"]):
        if script in MODELS and not {*words} & {"cifar10", "imagenette", "--fid"}:
            found[script, *words] = None
    return list(found)


@pytest.mark.parametrize("line", cheap_commands(), ids=" ".join)
def test_commands_of_the_readme_run(line, tiny_data, tmp_path, monkeypatch):
    """As printed but for their length, two steps, and tiny data.

    After a run of two steps one that goes on makes a third; flags of that run that are not printed
    follow from its checkpoint.
    """
    cut_short(monkeypatch)
    narrow_networks(monkeypatch)
    script, *words = line
    short = flags_for(script, tiny_data, tmp_path, name="first")
    if "moons" in words:
        short += ["--batch_size", "500"]
    if {*words} & {"--resume", "--eval"}:
        with monkeypatch.context() as patch:
            patch.setattr(f"{script}.save_figures", nothing)
            patch.setattr(f"{script}.evaluate", nothing)
            assert call(script, short) == 0
        short = ["--out_dir", str(tmp_path), "--name", "first", "--steps", "3"]
    assert call(script, [*words, *short]) == 0
    if "--help" not in words:
        assert records(tmp_path / "first")[-1]["step"] == (3 if "--resume" in words else 2)


def test_the_cheap_ones_are_some():
    lines = cheap_commands()
    assert {script for script, *_ in lines} >= {"selfvae", "realnvp"}
    assert {"--help", "--resume", "--eval"} <= {word for _, *words in lines for word in words}


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
    model = getattr(module, MODELS[checkpoint["script"]])(cfg, shape)
    model.load_state_dict(checkpoint["model"])
    if cfg.dataset == "shapes":
        pixels, _ = common.make_shapes(8, size, seed=1)
        x = common.from_uint8(torch.from_numpy(pixels).movedim(3, 1))
        assert common.bits_per_dim(-model.elbo(x).mean().item(), 3 * size**2) < 4.5


# ---- Exercises -----------------------------------------------------------------------------------

DURATIONS = r".* \((half an hour|an hour|two hours|half a day|a day|two days|a week)\)\n"


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
    all_of = exercises()
    wrong = []
    for (without, numbers), outcomes in zip(trees(), grades()):
        missing = dict(without)
        selected = set()
        for n in set(numbers) & set(all_of):
            functions, graders = all_of[n]
            tests = {": ".join(grader) for grader in graders}
            selected |= tests
            found = {outcome for test in tests for outcome in outcomes[test]}
            if missing.get(n, functions) != functions:  # one of several
                right = "failed" in found
            else:
                right = found == {"failed" if n in missing else "passed"}
            if not right:
                wrong.append(f"without {without}, the tests of exercise {n} have {found}")
        assert set(outcomes) == selected, numbers
    assert wrong == []


def test_exercises_are_emptied_and_put_back(tmp_path):
    """The command line, in a repository of its own.

    Nothing that somebody wrote is overwritten, and a solution brings back its functions alone.
    """
    (tmp_path / "docs").mkdir()
    for file in ("common.py", "selfvae.py", "vae.py", "docs/exercises.py", "docs/exercises.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    path = tmp_path / "common.py"
    ours = SOURCES["common.py"]

    def shell(line):
        line = line.replace("python", sys.executable)
        return subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, encoding="utf-8")

    def exercise(words, told=None):
        """python docs/exercises.py; with `told` it is refused in a line -> common.py after it."""
        done = shell(f"python docs/exercises.py {words}")
        assert done.returncode == (2 if told else 0), done.stderr
        assert not told or (told in done.stderr and len(done.stderr.splitlines()) == 1)
        return path.read_text(encoding="utf-8")

    committed = shell("git init -q && git add . && "
                      "git -c user.name=a -c user.email=a commit -qm one")
    assert committed.returncode == 0
    emptied = exercise("1 4")
    assert emptied.count("raise NotImplementedError") == 3  # exercise 4 has one in selfvae.py too
    assert ast.get_docstring(definition(emptied, "log_mean_exp"))
    mine = re.sub(r"raise NotImplementedError\('log_mean_exp is .*\)", "return 'mine'", emptied)
    assert mine != emptied
    path.write_text(mine, encoding="utf-8")
    assert exercise("1", "log_mean_exp") == mine
    assert exercise("4 --solution") != ours
    assert "NotImplementedError" not in path.read_text(encoding="utf-8")
    assert exercise("1 --solution") == ours
    # 2 is of a file that is not here: 1 is left alone too.
    assert exercise("1 2", "realnvp.py") == ours
    # 3 hides log_weights, which is exercise 6, unless somebody wrote it.
    model = tmp_path / "vae.py"
    exercise("3")
    hidden = model.read_text(encoding="utf-8")
    assert hidden.count("raise NotImplementedError") == 2
    written = hidden.replace(lines_of(hidden, "VAE.log_weights")[-1], "        return 'mine'")
    model.write_text(written, encoding="utf-8")
    exercise("3 --solution")
    assert "return 'mine'" in model.read_text(encoding="utf-8")
    exercise("3")
    assert model.read_text(encoding="utf-8") == written
    exercise("3 6 --solution")
    assert model.read_text(encoding="utf-8") == SOURCES["vae.py"]
    assert shell("python docs/exercises.py 99").returncode == 2
    assert shell("python docs/exercises.py").returncode == 2
    path.write_text(ours.replace("def log_mean_exp(", "def log_mean_exp(("), encoding="utf-8")
    exercise("1 --solution", "common.py")
