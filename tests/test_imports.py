"""Who may import whom, read from the source without running it."""

import ast
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Left never imports right; siblings of one group never import each other.
ORDER = [
    {"errors"},
    {"files", "progress", "config", "compiling"},
    {"trees"},
    {"parallel", "diffusion"},
    {"layers"},
    {"attention"},
    {"text"},
    {"models", "data"},
    {"worlds"},  # they write their clips with data/video.py
    {"training", "sampling"},
    {"evaluation"},
    {"export"},
    {"stages"},
    {"third_party"},
    {"cli"},
]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
# Files at home anywhere: everything may import them, and they import only what is left of them.
OUTSIDE = {"experiments", "launch", "benchmarks"}

# Training steps run where these are not installed: neither they nor what they import name them at
# the top of a module.
DATA_LIBRARIES = {"array_record", "av", "grain", "ml_collections", "tensorflow_datasets"}
STEP = (
    "vidsim.attention",
    "vidsim.diffusion",
    "vidsim.layers",
    "vidsim.models",
    "vidsim.parallel",
    "vidsim.training.loop",
    "vidsim.training.objectives",
    "vidsim.training.optimizer",
    "vidsim.training.state",
    "vidsim.training.step",
    "vidsim.training.vae_losses",
)


def sources() -> dict[str, str]:
    """Module name -> source, of everything that installs."""
    found = {}
    for folder, package in (("vidsim", "vidsim"), ("third_party", "vidsim.third_party")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path.read_text(encoding="utf-8")
    return found


def imported(module: str, source: str, *, top_level: bool = False) -> set[str]:
    """Every module that `source` imports, in full; `top_level` leaves out what functions import."""
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *base.split(".")]).strip(".")
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def is_step(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in STEP)


def way_to_data_library(module: str, known: dict[str, str]) -> list[str]:
    """The chain of imports at the top of modules from `module` to a data library; [] if none."""
    ways, seen = [[module]], {module}
    while ways:
        way = ways.pop(0)
        for name in sorted(imported(way[-1], known[way[-1]], top_level=True)):
            if name.split(".")[0] in DATA_LIBRARIES:
                return [*way, name]
            # `from vidsim.data.video import probe` names a module and something in it.
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def faults(module: str, source: str) -> list[str]:
    """What `source`, as module `module`, imports against the order."""
    own = module.split(".")[1] if "." in module else ""
    if own and own not in RANK:
        return [f"{module}: {own!r} has no place in ORDER; give it one"]
    found = []
    for name in sorted(imported(module, source)):
        parts = name.split(".")
        if parts[0] in OUTSIDE:
            found.append(f"{module} imports {name}, which is outside the package")
        if parts[0] != "vidsim" or len(parts) < 2 or parts[1] == own:
            continue
        if parts[1] not in RANK:
            found.append(f"{module} imports {name}: {parts[1]!r} has no place in ORDER")
        elif parts[1] == "third_party" and own != "cli":
            found.append(f"{module} imports {name}; only cli may")
        elif not own or RANK[parts[1]] >= RANK[own]:
            found.append(f"{module} imports {name}, against the order")
    if is_step(module):
        for name in sorted(imported(module, source, top_level=True)):
            if name.split(".")[0] in DATA_LIBRARIES:
                found.append(f"{module} imports {name} at its top; the training step runs without")
    return found


def test_imports_follow_the_order():
    found = [fault for module, source in sources().items() for fault in faults(module, source)]
    assert not found, "\n".join(found)


def test_the_training_step_reaches_no_data_library():
    known = sources()
    steps = [module for module in known if is_step(module)]
    ways = [way for module in steps if (way := way_to_data_library(module, known))]
    assert not ways, "\n".join(" -> ".join(way) for way in ways)
    assert "vidsim.training.step" in steps
    assert way_to_data_library("vidsim.data.packing", known) == []


def test_a_data_library_is_found_through_other_modules():
    known = {
        "vidsim.training.loop": "from vidsim.sampling import modes",
        "vidsim.sampling.modes": "from vidsim.data.video import probe",
        "vidsim.data.video": "import av.video",
        "vidsim.training.step": "def f():\n    from vidsim.data import video",
    }
    way = ["vidsim.training.loop", "vidsim.sampling.modes", "vidsim.data.video", "av.video"]
    assert way_to_data_library("vidsim.training.loop", known) == way
    assert way_to_data_library("vidsim.training.step", known) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vidsim.layers.norms", "from vidsim.models import dit"),
        ("vidsim.layers.norms", "import vidsim.models.dit"),
        ("vidsim.layers.norms", "from vidsim import models"),
        ("vidsim.layers.norms", "from ..models import dit"),
        ("vidsim.layers.norms", "from .. import models"),
        ("vidsim.parallel.mesh", "def f():\n    from vidsim.layers import norms"),
        ("vidsim.models.dit", "from vidsim.data import video"),
        ("vidsim.data.latents", "from vidsim.models import vae"),
        ("vidsim.data.prepare", "from vidsim.worlds import physics"),
        ("vidsim.training.loop", "from vidsim.sampling import generate"),
        ("vidsim.config", "from vidsim import files"),
        ("vidsim.trees", "import vidsim.layers"),
        ("vidsim.errors", "from vidsim.files import write_text"),
        ("vidsim.evaluation.report", "from vidsim.third_party.vbench import layout"),
        ("vidsim.third_party.vbench", "import vidsim.cli.main"),
        ("vidsim.cli.train", "from experiments import quickstart"),
        ("vidsim.cli.train", "import benchmarks"),
        ("vidsim.stages", "import launch.local"),
        ("vidsim.stages", "from vidsim.utils import things"),
        ("vidsim.utils", ""),
        ("vidsim", "from vidsim import errors"),
        ("vidsim.models.dit", "import grain"),
        ("vidsim.training.step", "from ml_collections import ConfigDict"),
        ("vidsim.training.loop", "import grain"),
        ("vidsim.layers.norms", "try:\n    import av\nexcept ImportError:\n    av = None"),
    ],
)
def test_planted_faults_are_found(module, source):
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vidsim.files", "from vidsim.errors import InputError"),
        ("vidsim.layers.norms", "from vidsim.layers.parameter import parameter"),
        ("vidsim.layers.norms", "from . import parameter"),
        ("vidsim.attention.segments", "from vidsim.parallel.mesh import AXES"),
        ("vidsim.cli.export", "from vidsim.third_party.wan import names"),
        ("vidsim.worlds.physics", "from vidsim.data import video"),
        ("vidsim.sampling.modes", "from vidsim.data.shapes import nearest_size"),
        ("vidsim.data.pipeline", "import grain"),
        ("vidsim.models.dit", "def f():\n    import grain"),
    ],
)
def test_good_imports_pass(module, source):
    assert faults(module, source) == []


def test_dependencies_are_declared_alike_everywhere():
    """setup.py, the table of licences and the constraints name the same versions."""
    lists = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    requirements = [*lists["REQUIRED"]]
    for extra in ("test", "prepare", "quantised"):
        requirements += lists["EXTRAS"][extra]
    named = dict(one.lower().split(">=") for one in requirements)
    table = tomllib.loads((ROOT / "third_party/dependencies.toml").read_text(encoding="utf-8"))
    table = {name.lower(): row for name, row in table.items()}
    assert set(table) == set(named)
    for python in ("311", "312"):
        text = (ROOT / f"third_party/constraints-py{python}.txt").read_text(encoding="utf-8")
        pins = dict(line.split("==") for line in text.splitlines())
        pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
        for name, row in table.items():
            assert row[f"python{python}"] == pins[name], name
    for name, row in table.items():
        assert named[name] == row["python311"], f"the lower bound of {name} is not what was tested"
        assert row["licence"]
        assert row["use"]
