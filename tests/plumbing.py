"""How much of each script is plumbing and not science: python tests/plumbing.py

Plumbing is Config, the flags, and the region that is the same in every script: the run's folder,
checkpoints, precision, main. Blank lines are not counted.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def plumbing(script):
    """-> lines that are plumbing, all lines, blank ones left out."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    total = 0
    inside = 0
    is_plumbing = False
    for line in lines:
        if line.startswith("# ---- "):
            is_plumbing = line.startswith("# ---- Config")
        if line.startswith("# --- same in every script"):
            is_plumbing = True
        if line.strip():
            total += 1
            inside += is_plumbing
    return inside, total


if __name__ == "__main__":
    for name in ("vae", "selfvae", "realnvp", "dcvae"):
        part, whole = plumbing(name)
        print(f"{name}.py: {part} of {whole} lines are plumbing, {100 * part / whole:.0f} %")
