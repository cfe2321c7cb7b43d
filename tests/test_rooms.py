"""The layout of the house: which room may import which, read from every import statement."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up; a module imports from its own floor or a lower one.
FLOORS = [
    ["errors"],
    [
        "atomic",
        "sampling",
        "stop_strings",
        "kernel_cache",
        "compiler",
        "pip_libraries",
        "yarn",
        "dequantise",
        "hub",
        "pace",
        "json_schema",
        "one_reader",
        "tool_schema",
    ],
    ["config", "tokenizer", "reply", "device"],
    ["speculate"],
    ["checkpoint", "chat", "pull", "quantize", "tools", "structured"],
    ["overflow", "tool_loop"],
    ["shards", "placement", "buffers", "shelf"],
    ["prefix_file"],
    ["linear", "rope", "kv_cache", "kv_sizes", "tuning"],
    ["model", "plan"],
    ["forward"],
    ["step_graph"],
    ["generate"],
    ["slots"],
    ["loop_guard", "start"],
    ["reply_loop"],
    ["batch"],
    ["llm"],
    ["bench", "check", "kernels", "replay"],
    ["usage"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: n for n, floor in enumerate(FLOORS) for name in floor}
WITHOUT_TINYGRAD = ["errors", "config", "checkpoint", "tokenizer", "chat", "reply"]
WITHOUT_TINYGRAD += ["stop_strings", "sampling", "compiler", "yarn", "kv_sizes", "shards", "plan"]
WITHOUT_TINYGRAD += [
    "shelf",
    "prefix_file",
    "pace",
    "speculate",
    "tools",
    "tool_loop",
    "structured",
    "loop_guard",
    "reply_loop",
    "llm",
    "replay",
    "batch",
    "usage",
    *(f"cli.{name}" for name in ("generate", "chat", "batch", "replay", "plan", "bench", "tune")),
]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


PRODUCT = sorted((ROOT / "qwen3_tg").rglob("*.py"))
REFERENCE = sorted((ROOT / "backends" / "qwen3_tg_numpy").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


CPU_KERNELS = sorted((ROOT / "backends" / "qwen3_tg_cpu").rglob("*.py"))


def test_every_room_is_there() -> None:
    assert len(CPU_KERNELS) > 2
    assert len(PRODUCT) > 15
    assert len(REFERENCE) > 4
    assert len(EXAMPLES) > 2


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_product_never_imports_tools_tests_or_examples(path: Path) -> None:
    assert not roots(path) & {"tools", "tests", "examples", "conftest", "torch", "transformers"}


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.name)
def test_the_reference_is_independent(path: Path) -> None:
    allowed = {"numpy", "safetensors", "gguf", "ml_dtypes", "qwen3_tg_numpy", "__future__"}
    assert roots(path) <= allowed | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", CPU_KERNELS, ids=lambda p: p.name)
def test_the_cpu_kernels_know_nothing_of_the_product(path: Path) -> None:
    allowed = {"numpy", "tinygrad", "qwen3_tg_cpu", "__future__"}
    assert roots(path) <= allowed | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_use_the_public_interface_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    private = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr[0] == "_"]
    assert [name for name in private if not name.startswith("__")] == []
    import qwen3_tg

    for name in imports(path):
        if name.startswith("qwen3_tg."):
            assert name.removeprefix("qwen3_tg.") in qwen3_tg.__all__


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT / "qwen3_tg").with_suffix("").parts
    if parts == ("__init__",):
        return
    for name in imports(path):
        names = name.split(".")
        if names[0] != "qwen3_tg" or len(names) == 1 or names[1] == "__version__":
            continue
        if parts[0] != names[1]:
            assert names[1] in FLOOR, f"{names[1]} has no floor: give it one here"
            assert FLOOR[names[1]] <= FLOOR[parts[0]], f"{path.name} imports {name}, a floor above"


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for path in PRODUCT:
        module = path.relative_to(ROOT / "qwen3_tg").with_suffix("").parts[0]
        used = {name.split(".")[1] for name in imports(path) if name.startswith("qwen3_tg.")}
        graph.setdefault(module, set()).update((used & set(FLOOR)) - {module})
    while leaves := {m for m, used in graph.items() if not used & set(graph)}:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"circle among {sorted(graph)}"


@pytest.mark.parametrize("module", WITHOUT_TINYGRAD)
def test_text_and_files_need_no_tinygrad(module: str) -> None:
    code = f"import qwen3_tg.{module}, sys; sys.exit('tinygrad' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_the_package_is_cheap() -> None:
    code = "import qwen3_tg, sys; heavy = {'tinygrad', 'numpy', 'tokenizers', 'jinja2'}; "
    code += "sys.exit(bool(heavy & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_public_name_imports_tinygrad_before_its_environment_is_prepared() -> None:
    # prepare_environment leaves CACHEDB alone where tinygrad has been imported already
    code = "import qwen3_tg, os, sys; [getattr(qwen3_tg, name) for name in dir(qwen3_tg)]; "
    code += "from qwen3_tg import Request, Batch, Answer; assert 'tinygrad' not in sys.modules; "
    code += "from qwen3_tg import Generation, Slots; assert 'tinygrad' in sys.modules; "
    code += "sys.exit('CACHEDB' not in os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "CACHEDB"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_dir_and_help_show_what_is_public() -> None:
    code = "import qwen3_tg; assert 'load' in dir(qwen3_tg) and 'Any' not in dir(qwen3_tg); "
    code += "assert set(qwen3_tg.__all__) < set(dir(qwen3_tg)); import pydoc; "
    code += "print(pydoc.render_doc(qwen3_tg, renderer=pydoc.plaintext))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for shown in (
        "load         a checkpoint",
        "FUNCTIONS\n    load(",
        "class LLM(",
        "class Request(",
    ):
        assert shown in run.stdout, shown


def test_model_and_reference_have_the_same_parts_in_the_same_order() -> None:
    def classes(path: Path) -> list[str]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]

    ours = classes(ROOT / "qwen3_tg" / "model.py")
    theirs = classes(ROOT / "backends" / "qwen3_tg_numpy" / "model.py")
    assert [name for name in theirs if name in ours] == ours


def test_the_page_to_learn_qwen3_from_stays_short() -> None:
    lines = (ROOT / "qwen3_tg" / "model.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
