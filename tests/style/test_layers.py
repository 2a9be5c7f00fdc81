"""What may depend on what: arrows point down only."""

from __future__ import annotations

import ast
import tomllib

from tests.style.repository import REPOSITORY, files, text, with_suffix

# Python's layers, lowest first. A module may import from its own layer's package and from layers below; packages
# that share a layer don't know each other.
PYTHON_LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"_paths", "_binaries", "_native"}),
    frozenset({"lowlevel", "guest", "image", "host"}),
    frozenset({"network"}),
    frozenset({"machine"}),
    # Its driver speaks machine's interface; machine finds it by name.
    frozenset({"container"}),
    frozenset({"sandbox", "aio", "snapshot"}),
    frozenset({"cli", "api"}),
)


def own_crates() -> list[str]:
    """The crates that others may depend on, in the order in which the workspace lists them."""
    workspace = tomllib.loads(text(REPOSITORY / "Cargo.toml"))
    dependencies = workspace["workspace"]["dependencies"]
    return [name for name in dependencies if name.startswith("ringfence-")]


def test_crates_depend_on_crates_above_them_in_the_workspace() -> None:
    order = own_crates()
    wrong = []
    for path in files():
        if path.name != "Cargo.toml" or path.parts[0] != "crates":
            continue
        crate = tomllib.loads(text(path))
        name = crate["package"]["name"]
        rank = order.index(name) if name in order else len(order)
        allowed = set(order[:rank])
        wrong += [
            f"{name} depends on {needed}"
            for needed in crate.get("dependencies", {})
            if needed.startswith("ringfence-") and needed not in allowed
        ]
    assert wrong == []


def imported(tree: ast.Module) -> set[str]:
    """The parts of the package that a module imports when it runs; types alone don't count."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ringfence":
                names |= {f"ringfence.{alias.name}" for alias in node.names}
            names.add(node.module)
        pending += ast.iter_child_nodes(node)
    parts = (name.split(".") for name in names)
    return {part[1] for part in parts if part[0] == "ringfence" and len(part) > 1}


def test_python_packages_import_from_layers_below() -> None:
    rank = {name: level for level, layer in enumerate(PYTHON_LAYERS) for name in layer}
    wrong = []
    for path in with_suffix(".py"):
        if path.parts[:2] != ("src", "ringfence") or len(path.parts) < 3:
            continue
        own = path.parts[2].removesuffix(".py")
        # The package's front re-exports from everywhere.
        if own in {"__init__", "__main__"}:
            continue
        if own not in rank:
            wrong.append(f"{path}: {own} has no layer")
            continue
        for part in imported(ast.parse(text(path))) - {own}:
            if part not in rank:
                continue
            if rank[part] >= rank[own]:
                wrong.append(f"{path} imports {part}")
    assert wrong == []


def test_only_the_door_knows_pyo3() -> None:
    users = [
        str(path)
        for path in files()
        if path.name == "Cargo.toml" and path.parts[0] == "crates" and "pyo3" in text(path)
    ]
    assert users == ["crates/python/Cargo.toml"]
