"""Lists the scripts of this folder and runs them, each in a process of its own.

    python -m benchmarks --list       only lists them
    python -m benchmarks              runs all
    python -m benchmarks NAME ...     runs some

Claims are JSON lines on stdout, everything else is on stderr. A goal that is not reached is a
result, not an error; the exit code is 1 only when a script broke.
"""

import ast
import pathlib
import subprocess
import sys

from absl import app, flags

FOLDER = pathlib.Path(__file__).parent

LIST = flags.DEFINE_bool("list", False, "List the scripts and what they measure; run nothing.")


def scripts() -> dict[str, str]:
    """Name -> first line of the docstring, without importing any of them."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if not path.name.startswith("_"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.partition("\n")[0]
    return found


def main(argv: list[str]) -> int:
    known = scripts()
    names = argv[1:] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: no benchmark {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    width = max(map(len, names), default=0)
    listing = sys.stdout if LIST.value else sys.stderr
    for name in names:
        print(f"{name:{width}}  {known[name]}", file=listing, flush=True)
    if LIST.value:
        return 0
    broken = []
    for name in names:
        print(f"== {name}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=FOLDER.parent)
        if done.returncode:
            broken.append(name)
            print(f"{name} ended with code {done.returncode}", file=sys.stderr, flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    app.run(main)
