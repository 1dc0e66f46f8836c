"""The agreements between the scripts, checked on their source text.

Copies, imports, banners, flags, docstrings, plain code, docs.
"""

import ast
import builtins
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import MODELS, ROOT, SCRIPTS


def text_of(path):
    """The text of a file, in whatever locale the tests run."""
    return path.read_text(encoding="utf-8")


SOURCES = {f"{name}.py": text_of(ROOT / f"{name}.py") for name in ["common", *SCRIPTS]}
INDEX = ROOT / "docs" / "README.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {INDEX})]
TESTS = {f"tests/{path.name}": text_of(path) for path in sorted((ROOT / "tests").glob("*.py"))}
OTHERS = {str(path.relative_to(ROOT)): text_of(path) for path in (ROOT / "docs").rglob("*.py")}
PYTHON = {**SOURCES, **TESTS, **OTHERS}
REGION = "# --- same in every script ---"
MARK = re.compile(r"# (Copied|Changed) from (\w+\.py): (.*)")


# ---- Copies --------------------------------------------------------------------------------------

def region_of(source):
    """-> (first line number, the lines) of the region same in every script, to `if __name__`."""
    lines = source.splitlines()
    start = None
    for i, line in enumerate(lines):
        if start is None and line.startswith(REGION):
            start = i
        if start is not None and line.startswith("if __name__"):
            return start + 1, lines[start:i]
    if start is None:
        return len(lines) + 1, []
    return start + 1, lines[start:]


def names_of(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return []
    names = []
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        names += [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
    return names


def first_line(node):
    """Number of a definition's first line, its decorators included."""
    return min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])


def definitions(source):
    """Top-level name -> (its source lines, the mark right above or None, line number).

    Up to the region that is the same in every script.
    """
    lines = source.splitlines()
    region, _ = region_of(source)
    found = {}
    for node in ast.parse(source).body:
        first = first_line(node)
        if first >= region:
            break
        mark = None
        above = first - 2
        while above >= 0 and lines[above].startswith("#"):
            mark = mark or MARK.match(lines[above])
            above -= 1
        for name in names_of(node):
            found[name] = ("\n".join(lines[first - 1:node.end_lineno]), mark, first)
    return found


def copy_violations(file, name, defined):
    """What is wrong with one definition of a file, marked or not -> lines."""
    text, mark, line = defined[file][name]
    bad = []
    if not mark:
        for other in defined:
            if other == file or name not in defined[other]:
                continue
            theirs = defined[other][name][1]
            if not theirs:  # two unmarked definitions; each pair is reported from both sides
                bad.append(f"{file}:{line} {name} is defined in {other} too, neither is marked")
            elif name not in defined.get(theirs[2], {}):
                bad.append(f"{other}: {name} is marked as from {theirs[2]}, "
                           "which does not define it")
        return bad
    kind, origin, rest = mark.groups()
    if origin == file or name not in defined.get(origin, {}):
        bad.append(f"{file}:{line} {name} is marked as from {origin}, which does not define it")
    elif kind == "Copied" and rest.strip() != name:
        bad.append(f"{file}:{line} the mark names {rest.strip()}, the definition is {name}")
    elif kind == "Copied" and text != defined[origin][name][0]:
        bad.append(f"{file}:{line} {name} differs from that in {origin}")
    elif kind == "Changed" and len(rest.strip()) < 3:
        bad.append(f"{file}:{line} {name} is changed from {origin}: why?")
    return bad


def violations(sources):
    """{file name: source} -> every breach of the agreement on copies, one line each."""
    bad = []
    defined = {file: definitions(source) for file, source in sources.items()}
    for file, names in defined.items():
        attached = set()
        for name, (_, mark, line) in names.items():
            bad += copy_violations(file, name, defined)
            if mark:
                attached.add(mark.group(0) if mark.group(1) == "Copied" else line)
        marks = [line for line in sources[file].splitlines() if MARK.match(line)]
        if len(marks) != len(attached):
            bad.append(f"{file} has {len(marks)} marks, of which {len(attached)} stand right above "
                       "a top-level definition")
    regions = {file: region_of(source)[1] for file, source in sources.items()}
    del regions["common.py"]
    first = next(iter(regions))
    for file, region in regions.items():
        if not region:
            bad.append(f"{file} has no region '{REGION}'")
        if region != regions[first]:
            bad.append(f"{file}: the region '{REGION}' differs from that in {first}")
    return bad


def test_copies_are_exact():
    """A fix reaches every copy, and `diff vae.py selfvae.py` shows only the science."""
    breaches = violations(SOURCES)
    assert not breaches, "\n".join(breaches)


def replaced(file, before, after):
    """SOURCES with one piece of one file replaced."""
    assert SOURCES[file].count(before) >= 1, before
    return SOURCES | {file: SOURCES[file].replace(before, after, 1)}


@pytest.mark.parametrize("before, after, told", [
    ("class Decoder(nn.Sequential):", "class Decoder(nn.Module):", "Decoder differs"),
    ("Huang et al. 2016), each", "Huang et al.), each", "DenseBlock differs"),
    ("LATENT = (16, 8, 8)", "LATENT = (16, 4, 4)", "LATENT differs"),
    ("@torch.no_grad()\ndef data_dependent", "def data_dependent", "data_dependent_init differs"),
    ("# Copied from vae.py: DenseBlock\n", "", "neither is marked"),
    ("# Copied from vae.py: DenseBlock", "# Copied from vae.py: conv", "the mark names conv"),
    ("# Copied from vae.py: DenseBlock", "# Copied from nowhere.py: DenseBlock",
     "nowhere.py, which does not define it"),
    ("# Changed from vae.py: the representations and the operations", "# Changed from vae.py: ",
     "why?"),
    ("def start_run(", "def begin_run(", "region"),
    (REGION, "# --- mine ---", "has no region"),
    ("def dense_blocks(", "# Copied from vae.py: train\n\ndef dense_blocks(", "marks, of which"),
])
def test_checker_notices_tampering(before, after, told):
    """Each kind of breach, made on purpose, is told."""
    assert any(told in line for line in violations(replaced("selfvae.py", before, after)))


# ---- Imports -------------------------------------------------------------------------------------

ALLOWED = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "matplotlib", "pytest"}
ALLOWED |= {"PIL"}  # which torchvision brings along
LOCAL = {"conftest", "exercises", "figures", "longruns", "two_processes", "test_agreements",
         "test_runs", "waking_z", *SCRIPTS}


@pytest.mark.parametrize("file", PYTHON)
def test_imports(file):
    """Five packages and the standard library; no script imports another, common imports none."""
    allowed = set(ALLOWED)
    if file != "common.py":
        allowed.add("common")
    if file not in SOURCES:
        allowed |= LOCAL
    for node in ast.walk(ast.parse(PYTHON[file])):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        for module in modules:
            assert module.split(".")[0] in allowed, f"{file}:{node.lineno} imports {module}"


def test_importing_does_nothing(tmp_path):
    """No argument is parsed, no file made, no CUDA started.

    Then a mistake, as a shell sees it: code 2, one line on stderr, no file.
    """
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['--junk', 'x']\n"
               f"import {', '.join(['common', *SCRIPTS])}, torch\n"
               "assert not torch.cuda.is_initialized()\n"
               "print('imported', flush=True)\n"
               "sys.exit(vae.main(vae.VAE, ['--dataset', 'nonsense']))")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          encoding="utf-8", env=environment)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "imported\n", 1)
    assert "'nonsense'" in done.stderr and "shapes" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- The shape of a script -----------------------------------------------------------------------

BANNERS = ["The model", "Special to this model", "Networks", "Building blocks", "Training",
           "Evaluation", "Copied from the other scripts", "Flags"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_in_order(script):
    """A reader learns the map once: the same sections in the same order, the model first."""
    lines = SOURCES[f"{script}.py"].splitlines()
    found = [line.strip("# -") for line in lines if line.startswith("# ---- ")]
    assert found == [name for name in BANNERS if name in found]
    assert {"The model", "Special to this model", "Evaluation", "Flags"} <= set(found)
    terms = [line for line in lines[:250] if re.match(r"    def (autoencoder_)?terms\(", line)]
    assert len(terms) == 1  # the bound, or the losses


@pytest.mark.parametrize("script", SCRIPTS)
def test_copies_stand_in_one_piece(script):
    """So who has come to them has read all that is new. `flag` stands with the flags."""
    part = None
    for line in SOURCES[f"{script}.py"].splitlines():
        if line.startswith(("# ---- ", REGION)):
            part = line.strip("# -")
        if line.startswith("# Copied from"):
            assert part == "Copied from the other scripts" or line.endswith(": flag"), line


def flags_read(source):
    """Every `cfg.name` that is read in a source."""
    read = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
            if owner == "cfg":
                read.add(node.attr)
    return read


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_read_and_explained(script):
    """Else a flag does nothing, or nobody knows what."""
    read = flags_read(SOURCES[f"{script}.py"]) | flags_read(SOURCES["common.py"])
    read |= {"size"}  # by Config.check, as self.size
    for field in dataclasses.fields(importlib.import_module(script).Config):
        assert field.name in read, f"--{field.name} is read nowhere"
        assert field.default is not dataclasses.MISSING, f"--{field.name} has no default"
        assert field.metadata["help"], f"--{field.name} has no help"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(script, capsys):
    """--help is the table of hyper-parameters."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as leave:
        module.parse_flags(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert leave.value.code == 0
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name}" in shown
        text = " ".join(field.metadata["help"].split())
        assert text in shown.replace("- ", "-"), field.name  # argparse breaks at hyphens


UNEXPLAINED = ("forward", "log_prob", "from_noise", "inverse")  # their class says what they do


@pytest.mark.parametrize("file", SOURCES)
def test_docstrings(file):
    """Every public function, class, and method of a model says what it takes and gives."""
    tree = ast.parse(SOURCES[file])
    assert ast.get_docstring(tree)
    missing = []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        if node.name != MODELS.get(file[:-3]):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                if method.name not in UNEXPLAINED and not ast.get_docstring(method):
                    missing.append(f"{node.name}.{method.name}")
    assert missing == []


# ---- Plain code ----------------------------------------------------------------------------------

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
CHANGES = {"append", "extend", "add", "update", "write", "pop", "remove", "setdefault"}


def inner(node, kinds):
    """The nodes of these kinds inside a node."""
    return [part for part in ast.walk(node) if part is not node and isinstance(part, kinds)]


def two_statements_on_a_line(tree):
    """Line numbers where a statement begins on the line of another."""
    seen = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            if node.lineno in seen:
                found.append(node.lineno)
            seen.add(node.lineno)
    return found


def in_any_code(node, bare_ifs):
    """What a reader of any file stumbles over at a node, or None."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return "a lambda bound to a name"
    if isinstance(node, ast.NamedExpr) and id(node) not in bare_ifs:
        return "a walrus that is not a bare if"
    if isinstance(node, (ast.BoolOp, ast.IfExp, *COMPREHENSIONS)):
        functions = [call.func for call in inner(node, ast.Call)]
        if CHANGES & {f.attr for f in functions if isinstance(f, ast.Attribute)}:
            return "a side effect inside an expression"
    return None


def in_scripts(node):
    """What a reader of a script stumbles over besides, or None."""
    if isinstance(node, COMPREHENSIONS) and inner(node, COMPREHENSIONS):
        return "a nested comprehension"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        return "{…}[key]()" if isinstance(node.func.value, ast.Dict) else None
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "zip":
        return "zip(*…)" if inner(node, ast.Starred) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for side in (node.left, node.right):
            if isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str):
                return "a string times something"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        if isinstance(node.value, (ast.Tuple, *COMPREHENSIONS)):
            return "several values in one assignment"
    if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 70:
        return f"{node.name} does not fit a screen"
    if isinstance(node, ast.arg) and hasattr(builtins, node.arg):
        return f"{node.arg} shadows a builtin"
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        if hasattr(builtins, node.id) and node.id not in ("compile", "eval"):  # two flags
            return f"{node.id} shadows a builtin"
    return None


def stumbles(source, script=True):
    """What a reader of a file stumbles over -> [(line number, what)]."""
    tree = ast.parse(source)
    found = [(line, "two statements on a line") for line in two_statements_on_a_line(tree)]
    bare_ifs = {id(node.test) for node in ast.walk(tree) if isinstance(node, ast.If)}
    for node in ast.walk(tree):
        what = in_any_code(node, bare_ifs)
        if script:
            what = what or in_scripts(node)
        if what:
            found.append((node.lineno, what))
    return found


@pytest.mark.parametrize("file", PYTHON)
def test_plain_code(file):
    """One statement a line, names instead of lambdas, loops instead of nests of comprehensions."""
    assert stumbles(PYTHON[file], script=file in SOURCES) == []


@pytest.mark.parametrize("line, what", [
    ("f = lambda x: x", "lambda"), ("a = 1; b = 2", "two statements"), ("if a: b()", "two"),
    ("[[x for x in y] for y in z]", "nested"), ("f(a := 1)", "walrus"), ("{1: f}[1]()", "key"),
    ("zip(*a)", "zip"), ("a.append(1) or f()", "side effect"), ("[b.append(x) for x in a]", "side"),
    ("'x' * small", "string"), ("a, b = f(), g()", "several"), ("a, b = (x for x in y)", "several"),
    ("def f(map): pass", "builtin"), ("sum = 1", "builtin"),
    ("def f():\n" + 71 * "    a()\n", "screen")])
def test_the_plain_code_checker_sees(line, what):
    """Each of the things that it is to find; and nothing in lines that are plain."""
    assert any(what in told for _, told in stumbles(line))
    assert stumbles("if a := f():\n    b = [g(x) for x in a]\n") == []


@pytest.mark.parametrize("file", PYTHON)
def test_lines_have_at_most_100_columns(file):
    """A script fits beside the paper."""
    for number, line in enumerate(PYTHON[file].splitlines(), 1):
        assert len(line) <= 100, f"{file}:{number} has {len(line)} columns"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_in_the_docs_has_at_most_100_columns(page):
    """Python in ```python blocks; a command is one line, and prose wraps by itself."""
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S):
        for line in block.splitlines():
            assert len(line) <= 100, f"{page.name}: {line}"


# ---- Documentation -------------------------------------------------------------------------------

def test_readme_exists():
    """The first thing that anybody opens."""
    assert (ROOT / "README.md").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_note_has_a_row_in_the_docs(script):
    """A difference from the paper stands in the code and in the table, or it is a surprise."""
    notes = SOURCES[f"{script}.py"].count("NOTE(paper)")
    rows = []
    inside = False
    for line in (ROOT / "docs" / f"{script}.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            inside = "differences from the paper" in line.lower()
        if inside and line.startswith("|") and "(NOTE(paper))" in line:
            rows.append(line)
    assert len(rows) == notes, f"{len(rows)} rows are marked for {notes} notes"


COMMAND = re.compile(r"(?:^|\s)(?:\S*python[\d.]*|\S*torchrun\b.*?)\s+(?:-\S+\s+)*"
                     r"(?:\S*/)?(\w+)\.py(?=\s|$)(.*)")


def unrolled(loop):
    """The match of a shell's `for` -> its body, once for each value."""
    return "\n".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())


def commands(text, fenced=True):
    """Every command that starts a script -> [(script, [arguments])].

    On a Markdown page in fenced blocks and `code spans`.
    """
    found = []
    inside = not fenced
    text = re.sub(r"for (\w+) in ([^;\n]+); do (.*); done", unrolled, text)
    for line in text.replace("\\\n", " ").splitlines():
        if fenced and line.lstrip().startswith("```"):
            inside = not inside
            continue
        for part in [line.strip()] if inside else re.findall("`([^`]+)`", line):
            match = COMMAND.search(part)
            if not match:
                continue
            words = []
            for word in shlex.split(match.group(2), comments=True):
                if word in ("|", "&", "&&", ";", ">", ">>", "2>&1"):
                    break
                words.append(word.rstrip(";"))
            found.append((match.group(1), words))
    return found


GONE = {"--accumulate", "--save_every", "--inception_weights", "--vgg_weights"}


def assert_parses(script, words):
    """The script takes this command line; every --device is read as cpu, as there may be no other.

    A command of an older commit, beside its results, may have flags that are gone.
    """
    if script not in MODELS or GONE & set(words):
        return
    words = ["cpu" if before == "--device" else word for before, word in zip(["", *words], words)]
    module = importlib.import_module(script)  # a command for no script fails here
    try:
        module.parse_flags(words)
    except SystemExit as leave:
        assert leave.code == 0, f"{script}.py {' '.join(words)}"


def test_commands_are_found():
    """Else the tests below would look at nothing."""
    page = ("```\n$ python vae.py --small --steps 3  # quick\n"
            "timeout -s INT 20m .venv/bin/python selfvae.py \\\n  --levels 2 | tee log\n"
            "OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 vae.py --lr 1\n```\n"
            "python vae.py --not_fenced, `python vae.py --size 64`, `diff vae.py selfvae.py`\n")
    loop = "```\nfor n in 1 2; do python vae.py --seed $n --name s$n; done\n```"
    assert commands(loop) == [
        ("vae", ["--seed", "1", "--name", "s1"]), ("vae", ["--seed", "2", "--name", "s2"])]
    assert commands(page) == [
        ("vae", ["--small", "--steps", "3"]), ("selfvae", ["--levels", "2"]),
        ("vae", ["--lr", "1"]), ("vae", ["--size", "64"])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_parse(page):
    """What is printed can be pasted; only results of old commits may name flags that are gone."""
    for script, words in commands(page.read_text(encoding="utf-8")):
        assert_parses(script, words)
        if page.name not in ("results.md", "performance.md"):
            assert not GONE & set(words), f"{script}.py {' '.join(words)}"


def test_readme_starts_every_script():
    """A ladder that leaves one out leaves its reader out."""
    started = {script for script, _ in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert started >= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_in_the_docstring_parse(script):
    """They stand at the top of the file."""
    docstring = ast.get_docstring(ast.parse(SOURCES[f"{script}.py"]))
    text = re.sub(r"(\.py.*?)\s{2,}.*", r"\1", docstring)  # what it does stands behind
    found = commands(text, fenced=False)
    assert found and {name for name, _ in found} == {script}
    for name, words in found:
        assert_parses(name, words)


def test_no_machine_paths():
    """Nothing points to the machine that it was written on."""
    private = re.compile("/" + "work" + "/|/" + "root" + "/|/" + "home" + r"/\w")
    files = {*PAGES[1:], *ROOT.glob("*.*"), *ROOT.glob("tests/*.py"), *ROOT.glob("docs/**/*.*")}
    for path in files:
        if path.suffix in (".py", ".md", ".txt"):
            assert not private.search(path.read_text(encoding="utf-8")), path.name
