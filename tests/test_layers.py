"""Who may import whom, read from the source: imports point down the layers, and heavy packages stay out of them."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "motif_jax"

# Lowest first. A module belongs to the layer of its longest prefix here, and imports from its own layer or below.
LAYERS = (
    ("errors", "config", "fields", "consistency", "commands", "html", "diffusion", "losses", "motion.heatmap"),
    ("models", "data", "dist", "motion"),
    (
        "interop",
        "motion.estimators",
        "training.state",
        "training.finetune",
        "training.optimizer",
        "training.checkpoint",
        "training.metrics",
        "training.weights",
    ),
    ("training.step",),
    (
        "training",
        "generation",
        "method",
        "requested",
        "pairs",
        "animation",
        "report",
        "towers",
        "preparation",
        "preview",
        "bench",
        "collectives",
        "compilation",
    ),
    ("main", "prepare", "sample", "convert", "compile", "bench.__main__"),
)
LAYER = {f"{PACKAGE}.{name}": level for level, names in enumerate(LAYERS) for name in names} | {PACKAGE: 0}
ENTRY_POINTS = len(LAYERS) - 1

# Beyond the layers: arrays in, arrays out; models and data ignorant of each other; a step that reads no files.
ARRAYS = ("diffusion", "losses", "motion.heatmap")
APART = [
    *((name, "config") for name in ARRAYS),
    ("config", "diffusion"),
    ("config", "losses"),
    ("config", "motion"),
    ("models", "data"),
    ("models", "dist"),
    ("models", "motion"),
    ("data", "models"),
    ("animation", "bench"),
    ("training.step", "data"),
    ("training.step", "dist"),
    ("training.step", "interop"),
]
SETTINGS = ("errors", "config", "fields", "consistency")  # the standard library and each other
ARRAY_PACKAGES = {"jax", "numpy", "jaxtyping", PACKAGE}
NEVER_AT_IMPORT = {"torch", "tensorflow", "clu"}  # clu.metric_writers loads tensorflow
HEAVY = NEVER_AT_IMPORT | {"transformers", "orbax", "matplotlib", "av", "cv2", "tensorflow_datasets", "grain"}


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    return {module_name(path, ROOT): path.read_text() for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports(source: str, known: set[str]) -> list[tuple[str, bool]]:
    """(imported module, whether importing this source imports it too: False inside functions and `if TYPE_CHECKING`)."""
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"line {node.lineno}: relative import; write the full name")
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.append((submodule if submodule in known else node.module, at_import))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_import)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                visit(child, at_import and not inside)

    visit(ast.parse(source), True)
    return found


def within(module: str, name: str) -> bool:
    return module == f"{PACKAGE}.{name}" or module.startswith(f"{PACKAGE}.{name}.")


def in_settings(module: str) -> bool:
    return any(within(module, name) for name in SETTINGS)


def layer(module: str) -> int | None:
    """The layer of the longest listed prefix; None for a module that no entry but the bare package covers."""
    prefix = module
    while prefix not in LAYER:
        prefix = prefix.rpartition(".")[0]
    return None if prefix == PACKAGE and module != PACKAGE else LAYER[prefix]


def faults(tree: dict[str, str]) -> list[str]:
    """Everything that breaks a rule in `tree` (module name -> source), one line each."""
    found = []
    for module, source in tree.items():
        own = layer(module)
        if own is None:
            found.append(f"{module}: has no layer; add it to LAYERS")
            continue
        for name, at_import in imports(source, set(tree)):
            package = name.partition(".")[0]
            if package == "tensorflow" or (package in NEVER_AT_IMPORT and at_import):
                found.append(
                    f"{module}: imports {name}" + (" on import; do so inside the function that needs it" if package == "torch" else "")
                )
            arrays = any(within(module, part) for part in ARRAYS)
            if arrays and package not in ARRAY_PACKAGES | sys.stdlib_module_names:
                found.append(f"{module}: imports {name}; array code needs jax and numpy only")
            if in_settings(module) and package not in sys.stdlib_module_names and not in_settings(name):
                found.append(f"{module}: imports {name}; the configuration needs the standard library only")
            if within(module, "models") and at_import and package in HEAVY:
                found.append(f"{module}: imports {name} on import, which models do not need")
            if package != PACKAGE:
                continue
            if (other := layer(name)) is not None and other > own:
                found.append(f"{module} (layer {own}): imports {name} (layer {other}), upwards")
            if own == other == ENTRY_POINTS and name != module:
                found.append(f"{module}: imports {name}, another entry point")
            found += [f"{module}: must not know {name}" for a, b in APART if within(module, a) and within(name, b)]
    return found


def test_layers():
    assert not (found := faults(sources())), "\n".join(found)


def test_no_import_cycles():
    tree = sources()
    graph = {
        module: {name for name, at_import in imports(source, set(tree)) if at_import and name in tree} for module, source in tree.items()
    }
    graph = {module: names - {PACKAGE} for module, names in graph.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
        cycle = []
    except graphlib.CycleError as error:
        cycle = error.args[1]
    assert not cycle, " -> ".join(cycle)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("diffusion.schedule", "from motif_jax.config import Config", "must not know motif_jax.config"),
        ("diffusion.schedule", "import flax", "array code"),
        ("losses", "def f():\n    from motif_jax.models import layers", "upwards"),
        ("motion.heatmap", "from motif_jax.motion import raft", "upwards"),
        ("config", "import numpy", "standard library only"),
        ("models.layers", "from motif_jax.data.videos import read", "must not know"),
        ("models.layers", "import transformers", "models do not need"),
        ("data.videos", "from motif_jax import models", "must not know"),
        ("data.videos", "def f():\n    import tensorflow as tf", "imports tensorflow"),
        ("interop.tables", "import torch", "inside the function"),
        ("interop.tables", "try:\n    import torch.nn\nexcept ImportError:\n    pass", "inside the function"),
        ("interop.tables", "class A:\n    import torch", "inside the function"),
        ("training.state", "from motif_jax.training import step", "upwards"),
        ("training.step", "from motif_jax.training.loop import train", "upwards"),
        ("training.step", "from motif_jax.data import pipeline", "must not know"),
        ("training.loop", "import motif_jax.main", "upwards"),
        ("main", "from motif_jax.sample import main", "another entry point"),
        ("helpers", "", "has no layer"),
    ],
)
def test_a_broken_rule_is_found(module, source, message):
    names = ("config", "models", "data", "motion.raft", "training.step", "training.loop", "main", "sample")
    tree = {f"{PACKAGE}.{name}": "" for name in names} | {f"{PACKAGE}.{module}": source}
    found = faults(tree)
    assert len(found) >= 1 and message in found[0], found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("interop.tables", "def f():\n    import torch"),
        ("training.loop", "from motif_jax import losses\nfrom motif_jax.training import step"),
        ("models.layers", "from motif_jax.config import UNetConfig\nimport flax"),
        ("main", "from absl import app\ndef f():\n    from motif_jax.training import loop"),
    ],
)
def test_what_the_rules_allow(module, source):
    names = ("config", "losses", "training.step", "training.loop")
    assert not faults({f"{PACKAGE}.{name}": "" for name in names} | {f"{PACKAGE}.{module}": source})


def in_the_encoding_of_the_locale(source: str) -> list[str]:
    """Calls that read or write text without saying as what."""
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    text = re.compile(r"(?!av\.)(.*\.(read_text|write_text)|open|.*\.open)\((.*)\)", re.DOTALL)
    found = [(call, match) for call in calls if (match := text.fullmatch(call)) and "encoding=" not in match[3]]
    return [call for call, match in found if match[2] or re.search(r"(^|, )'[rwax]\+?'", match[3]) or re.fullmatch(r"open\([^,]*\)", call)]


def test_text_is_utf8_in_every_locale():
    assert not {name: calls for name, source in sources().items() if (calls := in_the_encoding_of_the_locale(source))}
    for wrong in ("p.read_text()", "(a / 'b').write_text(f(x), errors='replace')", "open(p)", "open(p, 'w')", "p.open('a', newline='')"):
        assert in_the_encoding_of_the_locale(wrong) == [ast.unparse(ast.parse(wrong))]
    for right in (
        "p.read_text(encoding='utf-8')",
        "open(p, 'rb')",
        "tarfile.open(fileobj=f, mode='r:')",
        "Image.open(path)",
        "p.open('w+b')",
    ):
        assert not in_the_encoding_of_the_locale(right)


def test_importing_the_package_loads_neither_tensorflow_nor_torch():
    """Every module but the entry points (they define flags) in one fresh process: third-party packages count as well."""
    modules = [module for module in sources() if layer(module) != ENTRY_POINTS]
    assert f"{PACKAGE}.losses" in modules
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'tensorflow', 'torch'} & set(sys.modules)\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_the_benchmarks_waits_for_no_large_package():
    code = (
        "import importlib, sys\n"
        "from motif_jax.bench.__main__ import COMMANDS\n"
        "for name, _ in COMMANDS.values():\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'jax', 'scipy.stats', 'scipy.ndimage', 'tensorflow', 'torch'} & set(sys.modules)\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
