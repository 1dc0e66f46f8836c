"""The agreements between the scripts, checked on their source text: copies, imports, banners, flags, docstrings, docs."""

import ast
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import MODELS, ROOT, SCRIPTS

SOURCES = {f"{name}.py": (ROOT / f"{name}.py").read_text() for name in ["common", *SCRIPTS]}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REGION = "# --- same in every script ---"
MARK = re.compile(r"# (Copied|Changed) from (\w+\.py): (.*)")


# ---- Copies ------------------------------------------------------------------------------------------------------------

def region_of(source):
    """-> (first line number, the lines) of the region that is the same in every script, up to `if __name__`."""
    lines = source.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(REGION)]
    if not starts:
        return len(lines) + 1, []
    end = next((i for i, line in enumerate(lines) if i > starts[0] and line.startswith("if __name__")), len(lines))
    return starts[0] + 1, lines[starts[0]:end]


def definitions(source):
    """Top-level name -> (whole source lines with decorators, mark right above or None, line number), up to the region."""
    lines, found, (region, _) = source.splitlines(), {}, region_of(source)
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names, first = [node.name], min([node.lineno] + [d.lineno for d in node.decorator_list])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names, first = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)], node.lineno
        else:
            continue
        if first >= region:
            break
        mark, above = None, first - 2
        while above >= 0 and lines[above].startswith("#"):
            mark = mark or MARK.match(lines[above])
            above -= 1
        for name in names:
            found[name] = ("\n".join(lines[first - 1:node.end_lineno]), mark, first)
    return found


def violations(sources):
    """{file name: source} -> every breach of the agreement on copies, one line each."""
    bad, defined = [], {file: definitions(source) for file, source in sources.items()}
    for file, names in defined.items():
        for name, (text, mark, line) in names.items():
            others = [other for other in sources if other != file and name in defined[other]]
            if not mark:
                for other in others:
                    theirs = defined[other][name][1]
                    if not theirs:  # two unmarked definitions; each pair is reported from both sides
                        bad.append(f"{file}:{line} {name} is defined in {other} too, and neither is marked")
                    elif theirs[2] not in defined or defined[theirs[2]].get(name) is None:
                        bad.append(f"{other}: {name} is marked as from {theirs[2]}, which does not define it")
                continue
            kind, origin, rest = mark.groups()
            if origin == file or origin not in sources or name not in defined[origin]:
                bad.append(f"{file}:{line} {name} is marked as from {origin}, which does not define it")
            elif kind == "Copied" and rest.strip() != name:
                bad.append(f"{file}:{line} the mark names {rest.strip()}, the definition is {name}")
            elif kind == "Copied" and text != defined[origin][name][0]:
                bad.append(f"{file}:{line} {name} differs from that in {origin}")
            elif kind == "Changed" and len(rest.strip()) < 3:
                bad.append(f"{file}:{line} {name} is changed from {origin}: why?")
        marks = sum(bool(MARK.match(text)) for text in sources[file].splitlines())
        attached = len({mark.group(0) for _, mark, _ in names.values() if mark and mark.group(1) == "Copied"}) + \
            len({line for _, mark, line in names.values() if mark and mark.group(1) == "Changed"})
        if marks != attached:
            bad.append(f"{file} has {marks} marks, of which {attached} stand right above a top-level definition")
    regions = {file: region_of(source)[1] for file, source in sources.items() if file != "common.py"}
    for file, region in regions.items():
        if not region:
            bad.append(f"{file} has no region '{REGION}'")
        elif len(region) > 90:
            bad.append(f"{file}: the region '{REGION}' holds {len(region)} lines, 90 are allowed")
        if region != next(iter(regions.values())):
            bad.append(f"{file}: the region '{REGION}' differs from that in {next(iter(regions))}")
    return bad


def test_copies_are_exact():
    breaches = violations(SOURCES)
    assert not breaches, "\n".join(breaches)


def replaced(file, before, after):
    """SOURCES with one piece of one file replaced."""
    assert SOURCES[file].count(before) >= 1, before
    return SOURCES | {file: SOURCES[file].replace(before, after, 1)}


@pytest.mark.parametrize("before, after, told", [
    ("class Decoder(nn.Sequential):", "class Decoder(nn.Module):", "Decoder differs"),
    ("# Copied from vae.py: DenseBlock\nclass DenseBlock(nn.Module):\n", "# Copied from vae.py: DenseBlock\nclass DenseBlock(nn.Module):\n\n",
     "DenseBlock differs"),
    ("LATENT = (16, 8, 8)", "LATENT = (16, 4, 4)", "LATENT differs"),
    ("@torch.no_grad()\ndef data_dependent_init", "def data_dependent_init", "data_dependent_init differs"),
    ("# Copied from vae.py: DenseBlock\n", "", "neither is marked"),
    ("# Copied from vae.py: DenseBlock", "# Copied from vae.py: conv", "the mark names conv"),
    ("# Copied from vae.py: DenseBlock", "# Copied from nowhere.py: DenseBlock", "nowhere.py, which does not define it"),
    ("# Changed from vae.py: the representations and the operations", "# Changed from vae.py: ", "why?"),
    ("def start_run(", "def begin_run(", "region"),
    (REGION, "# --- mine ---", "has no region"),
    ("def dense_blocks(", "# Copied from vae.py: train\n\ndef dense_blocks(", "marks, of which"),
])
def test_checker_notices_tampering(before, after, told):
    assert any(told in line for line in violations(replaced("selfvae.py", before, after)))


# ---- Imports -----------------------------------------------------------------------------------------------------------

ALLOWED = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "matplotlib", "pytest", "common"}


@pytest.mark.parametrize("path", [ROOT / file for file in SOURCES] + sorted((ROOT / "tests").glob("*.py")) + [ROOT / "docs" / "figures.py"],
                         ids=lambda path: path.name)
def test_imports(path):
    allowed = ALLOWED | ({"conftest", "exercises", "pair", "test_agreements", "test_runs", *SCRIPTS} if path.parent != ROOT else set())
    if path.name == "common.py":
        allowed = allowed - {"common"}
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] in allowed, f"{path.name}:{node.lineno} imports {module}"


def test_importing_does_nothing(tmp_path):
    """No argument is parsed, no file made, no CUDA started. Then a mistake, as a shell sees it: code 2, one line on stderr, no file."""
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['--junk', 'x']\n"
               f"import {', '.join(['common', *SCRIPTS])}, torch\nassert not torch.cuda.is_initialized()\n"
               "print('imported', flush=True)\nsys.exit(vae.main(vae.VAE, ['--dataset', 'nonsense']))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "imported\n", 1)
    assert "'nonsense'" in done.stderr and "shapes" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- The shape of a script ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_in_order(script):
    lines = SOURCES[f"{script}.py"].splitlines()
    wanted = ["Config", "Building blocks", "Networks", "The model", "Training", "Evaluation"]
    at = [next((i for i, line in enumerate(lines) if line.startswith(f"# ---- {name}")), None) for name in wanted]
    if script == "realnvp":  # a flow has no networks apart from its blocks
        at = [i for i in at if i is not None]
        assert len(at) >= 4
    assert None not in at, [name for name, i in zip(wanted, at) if i is None]
    assert at == sorted(at)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_read_and_explained(script):
    tree = ast.parse(SOURCES[f"{script}.py"])
    tree.body = [node for node in tree.body if getattr(node, "name", None) != "Config"]
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and (getattr(node.value, "id", None) == "cfg" or getattr(node.value, "attr", None) == "cfg")}
    for field in dataclasses.fields(importlib.import_module(script).Config):
        assert field.name in read, f"--{field.name} is read nowhere"
        assert field.default is not dataclasses.MISSING, f"--{field.name} has no default"
        assert field.metadata.get("help"), f"--{field.name} has no help"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as leave:
        module.parse_flags(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert leave.value.code == 0
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name}" in shown
        assert " ".join(field.metadata["help"].split()) in shown.replace("- ", "-"), field.name  # argparse breaks at hyphens


@pytest.mark.parametrize("file", SOURCES)
def test_docstrings(file):
    tree, missing = ast.parse(SOURCES[file]), []
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [node.name]
            if node.name == MODELS.get(file[:-3]):  # its methods are the contract that tests and readers rely on
                missing += [f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)
                            and not method.name.startswith("_") and method.name not in ("forward", "log_prob", "from_noise")
                            and not ast.get_docstring(method)]
    assert missing == []


# ---- Documentation -----------------------------------------------------------------------------------------------------

def test_readme_exists():
    assert (ROOT / "README.md").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_note_has_a_row_in_the_docs(script):
    notes = SOURCES[f"{script}.py"].count("NOTE(paper)")
    lines = (ROOT / "docs" / f"{script}.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("#") and "differences from the paper" in line.lower())
    rows = []
    for line in lines[start + 1:]:
        if line.startswith("#"):
            break
        rows += [line] if line.startswith("|") and "(NOTE(paper))" in line else []
    assert len(rows) == notes, f"{len(rows)} rows are marked for {notes} notes"


COMMAND = re.compile(r"(?:^|\s)(?:\S*python[\d.]*|\S*torchrun\b.*?)\s+(?:-\S+\s+)*(?:\S*/)?(\w+)\.py(?=\s|$)(.*)")


def commands(text, fenced=True):
    """Every command that starts a script -> [(script, [arguments])]; on a Markdown page in fenced blocks and `code spans`."""
    found, inside = [], not fenced
    text = re.sub(r"for (\w+) in ([^;\n]+); do (.*); done",  # a loop is its body, once for each value
                  lambda loop: "\n".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()), text)
    for line in text.replace("\\\n", " ").splitlines():
        if fenced and line.lstrip().startswith("```"):
            inside = not inside
            continue
        for match in map(COMMAND.search, [line.strip()] if inside else re.findall("`([^`]+)`", line)):
            if not match:
                continue
            words = shlex.split(match.group(2), comments=True)
            end = next((i for i, word in enumerate(words) if word in ("|", "&", "&&", ";", ">", ">>", "2>&1")), len(words))
            found.append((match.group(1), [word.rstrip(";") for word in words[:end]]))
    return found


def assert_parses(script, words):
    """The script takes this command line. The machine here may have no GPU: every --device is read as cpu."""
    if script not in MODELS:
        return
    words = ["cpu" if before == "--device" else word for before, word in zip(["", *words], words)]
    module = importlib.import_module(script)  # a command for a script that does not exist fails here
    try:
        module.parse_flags(words)
    except SystemExit as leave:
        assert leave.code == 0, f"{script}.py {' '.join(words)}"


def test_commands_are_found():
    page = ("```\n$ python vae.py --small --steps 3  # quick\ntimeout -s INT 20m .venv/bin/python selfvae.py \\\n  --levels 2 | tee log\n"
            "OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 vae.py --lr 1\n```\npython vae.py --not_fenced, `python vae.py --size 64`, `diff vae.py selfvae.py`\n")
    assert commands("```\nfor n in 1 2; do python vae.py --seed $n --name s$n; done\n```") == [
        ("vae", ["--seed", "1", "--name", "s1"]), ("vae", ["--seed", "2", "--name", "s2"])]
    assert commands(page) == [("vae", ["--small", "--steps", "3"]), ("selfvae", ["--levels", "2"]), ("vae", ["--lr", "1"]),
                              ("vae", ["--size", "64"])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_parse(page):
    for script, words in commands(page.read_text()):
        assert_parses(script, words)


def test_readme_starts_every_script():
    assert {script for script, _ in commands((ROOT / "README.md").read_text())} >= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_in_the_docstring_parse(script):
    text = re.sub(r"(\.py.*?)\s{2,}.*", r"\1", ast.get_docstring(ast.parse(SOURCES[f"{script}.py"])))  # what it does stands behind
    found = commands(text, fenced=False)
    assert found and {name for name, _ in found} == {script}
    for name, words in found:
        assert_parses(name, words)


def test_no_machine_paths():
    private = re.compile("/" + "work" + "/|/" + "root" + "/|/" + "home" + r"/\w")
    files = [*PAGES[1:], *ROOT.glob("*.*"), *ROOT.glob("tests/*.py")]
    for path in {path for path in files if path.suffix in (".py", ".md", ".txt")}:
        assert not private.search(path.read_text()), path.name
