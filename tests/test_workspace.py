"""WORKSPACE.md names every module, where it stands."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_every_module_stands_in_the_map_of_the_tree():
    text = (ROOT / "WORKSPACE.md").read_text()
    tree = re.search(r"## The tree\n\n```\n(.*?)```", text, re.DOTALL)[1]
    folders, named = [], set()
    for line in tree.splitlines():
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            if name.endswith("/"):
                folders.append(name)
            named.add("".join([*folders, name]))
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("vidsim", "launch", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.stat().st_size  # not what only makes a folder a package
    }
    assert modules - named == set()
