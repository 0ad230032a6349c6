"""The laws of the house: which rooms import which, and how large anything may grow.

Read `cptool/README.md` for the rooms. Each list of exceptions only ever shrinks: an
entry that no longer occurs fails its test too.
"""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cptool"

ORDER = [
    {"__init__", "errors", "units", "files"},
    {"variants", "quantisation"},
    {"host"},
    # Numbers of a model without torch, for `planning`.
    {"model.config", "model.row_limits", "model.architectures", "model.shapes", "model.shares"},
    {"planning"},
    {"ops", "sharding"},
    {"cache"},
    {"model", "checkpoint"},
    {"distributed"},
    {"profiling"},
    {"parallel"},
    {"functional"},
    {"session"},
    {"engine"},
    {"exactness", "emulation", "calibration"},
    {"bench"},
    {"llm"},
    {"evaluation"},
    {"cli"},
    {"__main__"},
]
"""Rooms from low to high; a room imports from lower ones and, within a set, from its equals."""

MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES, MOST_COMMAND_LINES = 20, 350, 70, 40
MOST_PARAMETERS, MOST_POSITIONAL, MOST_FIELDS = 8, 4, 4

UPWARD: set[tuple[str, str]] = set()
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
LONG_SIGNATURES: set[str] = {
    "ops.attention._attention_partial",
    "ops.attention._attention_partial_fake",
    "ops.attention._attention_partial_into",
    "ops.attention._attention_partial_into_fake",
    "functional.hstu_attention",
    "ops.attention.attention_partial",
    "ops.attention_kernel.run_attention",
    "ops.silu_attention._silu_attention",
    "ops.silu_attention._silu_attention_fake",
    "ops.silu_attention._silu_attention_into",
    "ops.silu_attention._silu_attention_into_fake",
    "ops.silu_attention.silu_attention_partial",
}
POSITIONAL: set[str] = {
    "ops.attention: check_attention",
    "ops.attention: merge",
    "ops.attention: new",
    "ops.elementwise: dispatch",
    "ops.linear: _onednn",
}
POSITIONAL_DATACLASSES: set[str] = set()


@cache
def modules():
    """Name within the package, such as "planning.cost.rates", and the tree of every module."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): (
            path,
            ast.parse(path.read_text()),
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def statements(node, deep):
    """Import statements under `node`: those run on import, or with `deep`, those in functions too.

    Imports for type checking alone are left out.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif deep or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(child, deep)


def imported(name, deep=False):
    """Names of everything that a module imports; those of the package without "cptool."."""
    for statement in statements(modules()[name][1], deep):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        assert not statement.level, f"{name}: a relative import"
        base = statement.module or ""
        for alias in statement.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole.removeprefix("cptool.") in modules() else base


def arrows(deep=False):
    """(importing module, imported module), both of the package."""
    for name in modules():
        for target in imported(name, deep):
            if target == "cptool" or target.startswith("cptool."):
                yield name, target.removeprefix("cptool").removeprefix(".") or "__init__"


def within(name, room):
    return name == room or name.startswith(room + ".")


def room_of(name):
    """The most specific room of ORDER that a module lies in."""
    rooms = [room for level in ORDER for room in level if within(name, room)]
    return max(rooms, key=len)


def folder_of(name):
    return name.partition(".")[0]


def breaks(*, of, imports, deep=True):
    """Imports of `imports` (outside names whole, or "cptool.ROOM") in the room `of`."""
    return [
        f"{name} imports {target}"
        for name in modules()
        if within(name, of)
        for target in imported(name, deep)
        if any(within(target, forbidden) for forbidden in imports)
    ]


def test_planning_imports_no_torch():
    assert not breaks(of="planning", imports=["torch"])
    names = [f"cptool.{name}" for name in modules() if within(name, "planning")]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_command_line_and_the_package_import_no_torch():
    code = "import sys, cptool, cptool.cli.main, cptool.variants; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_model_knows_no_process_group_and_opens_no_file():
    outside = ["torch.distributed", "cptool.distributed", "cptool.parallel", "cptool.checkpoint"]
    files = ["os", "pathlib", "io", "json", "safetensors", "cptool.files"]
    assert not breaks(of="model", imports=[*outside, *files])
    for name, (_, tree) in modules().items():
        if within(name, "model"):
            calls = {
                n.func.id
                for n in ast.walk(tree)
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            }
            assert "open" not in calls, name


def test_ops_knows_no_world():
    rooms = ["distributed", "parallel", "engine", "session", "model", "checkpoint", "planning"]
    assert not breaks(of="ops", imports=[f"cptool.{room}" for room in rooms])


def test_parallel_knows_groups_and_no_world():
    assert not breaks(of="parallel", imports=["cptool.distributed.world", "cptool.engine"])


def test_host_knows_nothing_of_ranks():
    assert not breaks(
        of="host", imports=["cptool.distributed", "cptool.parallel", "torch.distributed"]
    )


def test_nothing_imports_the_command_line():
    found = [(a, b) for a, b in arrows(deep=True) if folder_of(b) == "cli" != folder_of(a)]
    assert found == [("__main__", "cli.entry")]


def test_one_module_writes_the_json_of_all_commands():
    writing = {
        name
        for name, (_, tree) in modules().items()
        if within(name, "cli") and "json.dump" in ast.unparse(tree)
    }
    assert writing == {"cli.json_output"}


def test_arrows_go_down():
    level = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
    upward = {
        (name, target) for name, target in arrows() if level[room_of(target)] > level[room_of(name)]
    }
    assert upward == UPWARD


def test_folders_import_each_other_in_no_circle():
    graph = defaultdict(set)
    for name, target in arrows():
        if folder_of(name) != folder_of(target):
            # The files of `model` that hold numbers alone count by themselves.
            target = target if room_of(target).startswith("model.") else folder_of(target)
            graph[folder_of(name)].add(target)
    done, open_ = set(), []

    def visit(folder):
        assert folder not in open_, f"a circle: {' -> '.join([*open_, folder])}"
        if folder in done:
            return
        open_.append(folder)
        for following in sorted(graph[folder]):
            visit(following)
        done.add(open_.pop())

    for folder in sorted(graph):
        visit(folder)


def test_folders_and_files_stay_small():
    sizes = Counter(path.parent for path, _ in modules().values())
    assert {str(folder): n for folder, n in sizes.items() if n > MOST_FILES} == {}
    long = {
        n for n, (path, _) in modules().items() if len(path.read_text().splitlines()) > MOST_LINES
    }
    assert long == LONG_FILES


def functions():
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{name}.{node.name}", node


def is_command(node):
    return any("command(" in ast.unparse(decorator) for decorator in node.decorator_list)


def body_lines(node):
    """Lines of a function's body, its docstring left out."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_functions_stay_short():
    long = {
        name
        for name, node in functions()
        if node.end_lineno - node.lineno >= MOST_FUNCTION_LINES and not is_command(node)
    }
    long |= {
        name
        for name, node in functions()
        if is_command(node) and body_lines(node) > MOST_COMMAND_LINES
    }
    assert long == LONG_FUNCTIONS


def test_signatures_stay_short():
    long = set()
    for name, node in functions():
        given = node.args
        count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
        first = given.args[:1] and given.args[0].arg in ("self", "cls")
        if count - bool(first) > MOST_PARAMETERS and not is_command(node):
            long.add(name)
    assert long == LONG_SIGNATURES


def test_calls_name_their_arguments():
    """Left out: the extension's functions, which take no names, and calls with a list of equals."""
    free = ("_C.", "_run", "click.", "min", "max", "print", "zip", "map", "range", "setattr")
    found = set()
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or len(node.args) <= MOST_POSITIONAL:
                continue
            called = ast.unparse(node.func)
            if not called.startswith(free) and not called.endswith(
                ("stack", "join", ".view", ".reshape", ".pack_into")
            ):
                found.add(f"{name}: {called}")
    assert found == POSITIONAL


def test_larger_dataclasses_are_filled_by_name():
    found = set()
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            decorators = [ast.unparse(d) for d in node.decorator_list]
            fields = [
                child
                for child in node.body
                if isinstance(child, ast.AnnAssign)
                and "ClassVar" not in ast.unparse(child.annotation)
            ]
            if any("dataclass" in d for d in decorators) and len(fields) > MOST_FIELDS:
                if not any("kw_only=True" in d for d in decorators):
                    found.add(f"{name}.{node.name}")
    assert found == POSITIONAL_DATACLASSES


def test_no_module_is_left_out_of_the_order():
    for name in modules():
        if name:
            room_of(name)


if __name__ == "__main__":
    pytest.main([__file__])


def test_test_files_have_names_of_their_own():
    """Pytest imports them by name, and would refuse to collect the second of two."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert {name: count for name, count in names.items() if count > 1} == {}
