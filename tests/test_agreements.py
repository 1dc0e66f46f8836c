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
from pathlib import Path

import pytest
from conftest import MODELS, ROOT, SCRIPTS


def texts(*patterns):
    """{path from the root: text} of files, in whatever locale the tests run."""
    found = {}
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return found


SOURCES = texts("common.py", *[f"{script}.py" for script in SCRIPTS])
PYTHON = SOURCES | texts("tests/*.py", "docs/**/*.py")
INDEX = ROOT / "docs" / "README.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {INDEX})]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
TEXTS["docs/README.md"] = INDEX.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)  # of code on a page: language, lines
REGION = "# --- same in every script ---"
MARK = re.compile(r"^# (Copied|Changed) from (\w+\.py): *(.*)", re.M)


# ---- Copies --------------------------------------------------------------------------------------

def definitions(source):
    """Top-level name -> (its source lines, the mark right above or None), above the REGION."""
    source = source.partition(REGION)[0]
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [getattr(target, "id", None) for target in node.targets]
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
        above = first
        while lines[above - 1].startswith("#"):
            above -= 1
        mark = MARK.search("\n".join(lines[above:first]))
        for name in filter(None, names):
            found[name] = ("\n".join(lines[first:node.end_lineno]), mark)
    return found


def violations(sources):
    """{file name: source} -> every breach of the agreement on copies, one line each."""
    bad = []
    defined = {file: definitions(source) for file, source in sources.items()}
    for file, names in defined.items():
        marked = 0
        for name, (text, mark) in names.items():
            if not mark:
                for other in set(defined) - {file}:
                    if name in defined[other] and not defined[other][name][1]:
                        bad.append(f"{name} is defined in {file} and {other}, neither is marked")
                continue
            marked += 1
            kind, origin, rest = mark.groups()
            if origin == file or name not in defined.get(origin, {}):
                bad.append(f"{file}: {name} is from {origin}, which does not define it")
            elif kind == "Copied" and rest != name:
                bad.append(f"{file}: the mark names {rest}, the definition is {name}")
            elif kind == "Copied" and text != defined[origin][name][0]:
                bad.append(f"{file}: {name} differs from that in {origin}")
            elif kind == "Changed" and len(rest) < 3:
                bad.append(f"{file}: {name} is changed from {origin}: why?")
        marks = len(MARK.findall(sources[file]))
        if marks != marked:
            bad.append(f"{file} has {marks} marks, of which {marked} stand right above a "
                       "top-level definition")
    regions = set()
    for script in SCRIPTS:
        regions.add(sources[f"{script}.py"].partition(REGION)[2].partition("\nif __name__")[0])
    if len(regions) > 1:
        bad.append("the region differs")
    return bad


def test_copies_are_exact():
    """A fix reaches every copy, and `diff vae.py selfvae.py` shows only the science."""
    assert violations(SOURCES) == []


@pytest.mark.parametrize("before, after, told", [
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
    ("def dense_blocks(", "# Copied from vae.py: train\n\ndef dense_blocks(", "marks, of which"),
])
def test_checker_notices_tampering(before, after, told):
    """Each kind of breach, made on purpose, is told."""
    source = SOURCES["selfvae.py"]
    assert before in source
    tampered = SOURCES | {"selfvae.py": source.replace(before, after, 1)}
    assert any(told in line for line in violations(tampered))


# ---- Imports -------------------------------------------------------------------------------------

ALLOWED = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "matplotlib", "pytest"}
ALLOWED |= {"PIL"}  # which torchvision brings along


@pytest.mark.parametrize("file", PYTHON)
def test_imports(file):
    """Five packages and the standard library; no script imports another, common imports none."""
    allowed = set(ALLOWED)
    if file != "common.py":
        allowed.add("common")
    if file not in SOURCES:
        allowed |= {Path(other).stem for other in PYTHON}
    for node in ast.walk(ast.parse(PYTHON[file])):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
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
    """A reader learns the map once: the same sections in the same order, the model first.

    Copies stand in one piece, so who has come to them has read all that is new; `flag` and its
    SCALES stand with the flags.
    """
    lines = SOURCES[f"{script}.py"].splitlines()
    found = []
    for line in lines:
        if line.startswith("# ---- "):
            found.append(line.strip("# -"))
        if line.startswith("# Copied from"):
            with_the_flags = line.endswith((": flag", ": SCALES"))
            assert found[-1] == "Copied from the other scripts" or with_the_flags, line
    assert found == [name for name in BANNERS if name in found]
    assert {"The model", "Special to this model", "Evaluation", "Flags"} <= set(found)
    terms = [line for line in lines[:250] if re.match(r"    def (autoencoder_)?terms\(", line)]
    assert len(terms) == 1  # the bound, or the losses


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_read_and_explained(script, capsys):
    """Else a flag does nothing, or nobody knows what. --help is the table of hyper-parameters."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as leave:
        module.parse_flags(["--help"])
    assert leave.value.code == 0
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # broken at hyphens
    source = SOURCES[f"{script}.py"] + SOURCES["common.py"]
    for field in dataclasses.fields(module.Config):
        text = " ".join(field.metadata["help"].split())
        assert text and text in shown and f"--{field.name}" in shown, field.name
        read = re.search(rf"\b(cfg|self)\.{field.name}\b(?! = )", source)
        assert read, f"--{field.name} is read nowhere"


UNEXPLAINED = ("forward", "log_prob", "from_noise", "inverse")  # their class says what they do


@pytest.mark.parametrize("file", SOURCES)
def test_docstrings(file):
    """Every public function, class, and method of a model says what it takes and gives."""
    tree = ast.parse(SOURCES[file])
    assert ast.get_docstring(tree)
    nodes = list(tree.body)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == MODELS.get(file[:-3]):
            nodes += node.body
    missing = []
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node):
            if not node.name.startswith("_") and node.name not in UNEXPLAINED:
                missing.append(node.name)
    assert missing == []


# ---- Plain code ----------------------------------------------------------------------------------

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
CHANGES = {"append", "extend", "add", "update", "write", "pop", "remove", "setdefault"}


def inner(node, kinds):
    """The nodes of these kinds inside a node."""
    return [part for part in ast.walk(node) if part is not node and isinstance(part, kinds)]


def in_any_code(node):
    """What a reader of any file stumbles over at a node, or None."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return "a lambda bound to a name"
    if not isinstance(node, ast.If):
        if any(isinstance(child, ast.NamedExpr) for child in ast.iter_child_nodes(node)):
            return "a walrus that is not a bare if"
    if isinstance(node, (ast.BoolOp, ast.IfExp, *COMPREHENSIONS)):
        functions = [call.func for call in inner(node, ast.Call)]
        if CHANGES & {f.attr for f in functions if isinstance(f, ast.Attribute)}:
            return "a side effect inside an expression"
    name = None
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
    if name in ("open", "read_text", "write_text", "run", "Popen"):
        call = ast.unparse(node)
        opens = name.endswith("_text") or re.match(r"open\((?!.*b\+?')", call)
        if (opens and "encoding=" not in call) or "text=True" in call:
            return "a text file in the locale's encoding"
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
    name = None
    if isinstance(node, ast.arg):
        name = node.arg
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        name = node.id
    if name and hasattr(builtins, name) and name not in ("compile", "eval"):  # two flags
        return f"{name} shadows a builtin"
    return None


def stumbles(source, script=True):
    """What a reader of a file stumbles over -> [(line number, what)]."""
    found = []
    statements = []
    for node in ast.walk(ast.parse(source)):
        what = in_any_code(node)
        if script:
            what = what or in_scripts(node)
        if isinstance(node, ast.stmt):
            if node.lineno in statements:
                what = "two statements on a line"
            statements.append(node.lineno)
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
    ("def f(map): pass", "builtin"), ("sum = 1", "builtin"), ("open(a, 'r')", "encoding"),
    ("path.read_text()", "encoding"), ("def f():\n" + 71 * "    a()\n", "screen")])
def test_the_plain_code_checker_sees(line, what):
    """Each of the things that it is to find; and nothing in lines that are plain."""
    assert any(what in told for _, told in stumbles(line))
    assert stumbles("if a := f():\n    b = [g(x) for x in open(a, 'rb')]\n") == []


@pytest.mark.parametrize("file", [*PYTHON, *TEXTS])
def test_lines_have_at_most_100_columns(file):
    """A script fits beside the paper. On a page this is for code: prose wraps by itself."""
    text = PYTHON.get(file) or "\n".join(code for _, code in BLOCK.findall(TEXTS[file]))
    for line in text.splitlines():
        assert len(line) <= 100, line


# ---- Documentation -------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_note_has_a_row_in_the_docs(script):
    """A difference from the paper stands in the code and in the table, or it is a surprise."""
    _, table = TEXTS[f"{script}.md"].lower().split("differences from the paper\n")
    rows = re.findall(r"^\|.*\(note\(paper\)\)", table.split("\n#")[0], re.M)
    assert len(rows) == SOURCES[f"{script}.py"].count("NOTE(paper)")


COMMAND = re.compile(r"(?:^|\s)(?:\S*python[\d.]*|\S*torchrun\b.*?)\s+(?:-\S+\s+)*"
                     r"(?:\S*/)?(\w+)\.py(?=\s|$)(.*)")


def commands(text):
    """Every command of a page that starts a script, in blocks and `code spans`.

    -> [(script, [arguments])]. A loop's variable is 1.
    """
    lines = re.findall("`([^`\n]+)`", BLOCK.sub("", text))
    for _, block in BLOCK.findall(text):
        lines += block.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        match = COMMAND.search(line)
        if not match:
            continue
        words = []
        for word in shlex.split(re.sub(r"\$\w+", "1", match[2]), comments=True):
            if word in ("|", "&", "&&", ";", ">", ">>", "2>&1"):
                break
            words.append(word.rstrip(";"))
            if word.endswith(";"):
                break
        found.append((match[1], words))
    return found


GONE = {"--accumulate", "--save_every", "--inception_weights", "--vgg_weights"}


def assert_parses(script, words):
    """The script takes this command line; every --device is read as cpu, as there may be no other.

    A command of an older commit, beside its results, may have flags that are gone.
    """
    if script not in MODELS or GONE & set(words):
        return
    words = ["cpu" if before == "--device" else word for before, word in zip(["", *words], words)]
    module = importlib.import_module(script)
    try:
        module.parse_flags(words)
    except SystemExit as leave:
        assert leave.code == 0, f"{script}.py {' '.join(words)}"


def test_commands_are_found():
    """Else the tests below would look at nothing."""
    page = ("```\n$ python vae.py --small --steps 3  # quick\n"
            "timeout -s INT 20m .venv/bin/python selfvae.py \\\n  --levels 2 | tee log\n"
            "OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 vae.py --lr 1\n"
            "for n in 8 9; do python vae.py --seed $n --name s$n; done\n```\n"
            "python vae.py --not_fenced, `python vae.py --size 64`, `diff vae.py selfvae.py`\n")
    assert commands(page) == [
        ("vae", ["--size", "64"]), ("vae", ["--small", "--steps", "3"]),
        ("selfvae", ["--levels", "2"]), ("vae", ["--lr", "1"]),
        ("vae", ["--seed", "1", "--name", "s1"])]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_in_the_docs_parse(page):
    """What is printed can be pasted; only results of old commits may name flags that are gone."""
    for script, words in commands(TEXTS[page]):
        assert_parses(script, words)
        if page != "performance.md":
            assert not GONE & set(words), f"{script}.py {' '.join(words)}"


def test_first_runs_start_every_script():
    """A ladder that leaves one out leaves its reader out."""
    assert {script for script, _ in commands(TEXTS["running.md"])} >= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_in_the_docstring_parse(script):
    """They stand at the top of the file."""
    docstring = ast.get_docstring(ast.parse(SOURCES[f"{script}.py"]))
    text = re.sub(r"(\.py.*?)\s{2,}.*", r"\1", docstring)  # what it does stands behind
    found = commands(f"```\n{text}\n```")
    assert found and {name for name, _ in found} == {script}
    for name, words in found:
        assert_parses(name, words)


def test_no_machine_paths():
    """Nothing points to the machine that it was written on."""
    files = PYTHON | texts("*.md", "*.txt", "docs/**/*.md", "docs/**/*.txt")
    for path, text in files.items():
        assert not re.search(r"/(work|root|home/\w+)/", text), path
