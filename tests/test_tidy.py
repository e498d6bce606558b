"""The rules that a reader of the tree relies on, held by a test rather than by good will."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent

# An arrow between our crates goes to a strictly lower layer. A new crate fails until it has its place here.
CRATE_LAYERS = {
    "orchestra-core": 0,
    "orchestra-proto": 1,
    "orchestra-cluster": 1,
    "orchestra-memory": 1,
    "orchestra-kernels": 1,
    "orchestra-agent": 2,
    "orchestra-router": 2,
    "orchestra-py": 3,
    "orchestra-fuzz": 3,
    "orchestra-joint": 3,
    # Measures and breaks the router from outside: knows nothing of ours.
    "orchestra-rig": 0,
}
# Crates that would drag a layer's job to where it does not belong.
CRATES_ONLY_IN = {
    "pyo3": {"orchestra-py"},
    "axum": {"orchestra-router"},
    "tokenizers": {"orchestra-router"},
    "minijinja": {"orchestra-router"},
    "tonic": {
        "orchestra-proto",
        "orchestra-cluster",
        "orchestra-agent",
        "orchestra-router",
        "orchestra-joint",
    },
    "tokio": {
        "orchestra-cluster",
        "orchestra-agent",
        "orchestra-router",
        "orchestra-py",
        "orchestra-joint",
        "orchestra-rig",
    },
}
# The rest of the package must import where only the base dependencies are installed.
WORKER_ONLY_IMPORTS = {
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "msgpack",
    "prometheus_client",
    "transformers",
}
# The worker speaks to the router through `orchestra._core` alone.
NOT_IN_WORKER = {"grpc", "ctypes", "cffi"}

MAX_FILE_LINES = 500
SOURCE_SUFFIXES = {
    ".rs",
    ".py",
    ".pyi",
    ".proto",
    ".toml",
    ".md",
    ".sh",
    ".txt",
    ".yaml",
    ".yml",
    ".jinja",
}
FORBIDDEN_TEXT = {
    "/work/": "a path of one machine",
    "/root/": "a path of one machine",
    "TO" + "DO": "unfinished work belongs to the tracker",
    "FIX" + "ME": "unfinished work belongs to the tracker",
}


@cache
def tree_files() -> tuple[Path, ...]:
    """Every file of the tree, also new ones; what git ignores is left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(path for name in listing.split("\0") if name and (path := ROOT / name).is_file())


def is_generated(path: Path) -> bool:
    """Whether a tool wrote the file."""
    return path.is_relative_to(ROOT / "python/orchestra/v1") or path.suffix == ".snap"


def python_files(folder: str) -> list[Path]:
    """The hand-written Python files below a folder of the tree."""
    return [
        path
        for path in tree_files()
        if path.suffix == ".py" and path.is_relative_to(ROOT / folder) and not is_generated(path)
    ]


@cache
def cargo_packages() -> dict[str, dict[str, object]]:
    """Our crates by name, as cargo sees them."""
    command = ["cargo", "metadata", "--no-deps", "--format-version", "1", "--offline"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {package["name"]: package for package in json.loads(output)["packages"]}


def direct_dependencies(package: dict[str, object]) -> set[str]:
    """The names of a crate's direct dependencies of every kind."""
    dependencies = package["dependencies"]
    assert isinstance(dependencies, list)
    return {dependency["name"] for dependency in dependencies}


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Each module that a file imports, wherever it stands, with its line."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def pyproject() -> dict[str, object]:
    """The project table of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert isinstance(project, dict)
    return project


# === layers ===


def test_crate_arrows_go_down() -> None:
    packages = cargo_packages()
    assert packages.keys() == CRATE_LAYERS.keys(), "give every crate its layer in CRATE_LAYERS"
    wrong = [
        f"{name} -> {dependency}"
        for name, package in packages.items()
        for dependency in direct_dependencies(package) & CRATE_LAYERS.keys()
        if CRATE_LAYERS[dependency] >= CRATE_LAYERS[name]
    ]
    assert wrong == []


def test_foreign_crates_stay_in_their_layer() -> None:
    wrong = [
        f"{name} -> {dependency}"
        for name, package in cargo_packages().items()
        for dependency in direct_dependencies(package) & CRATES_ONLY_IN.keys()
        if name not in CRATES_ONLY_IN[dependency]
    ]
    assert wrong == []


def test_every_crate_inherits_the_workspace_lints() -> None:
    generated = {"orchestra-proto"}
    for name, package in cargo_packages().items():
        manifest = tomllib.loads(Path(str(package["manifest_path"])).read_text())
        assert name in generated or manifest.get("lints") == {"workspace": True}, name


def test_kernels_are_compiled_in_one_unit() -> None:
    """In several, what the loops of the generic kernels call may lie in another one, and is then not inlined."""
    profiles = tomllib.loads((ROOT / "Cargo.toml").read_text())["profile"]
    release, dist = profiles["release"], profiles["dist"]
    assert release["codegen-units"] == 1
    assert dist["inherits"] == "release"
    for profile in (release, dist):
        packages = profile.get("package", {})
        kernels = [packages.get(name, {}) for name in ("orchestra-kernels", "orchestra-py")]
        assert all(given.get("codegen-units", 1) == 1 for given in (profile, *kernels))


def test_package_outside_the_worker_needs_no_worker_dependency() -> None:
    worker = ROOT / "python/orchestra/worker"
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files("python/orchestra")
        if not path.is_relative_to(worker)
        for module, line in imports_of(path)
        if module.split(".")[0] in WORKER_ONLY_IMPORTS
    ]
    assert wrong == []


def test_worker_reaches_rust_only_through_core() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files("python/orchestra/worker")
        for module, line in imports_of(path)
        if module.split(".")[0] in NOT_IN_WORKER or module.startswith("orchestra.v1")
    ]
    assert wrong == []


def test_import_of_the_package_stays_light() -> None:
    modules = "orchestra, orchestra.cli, orchestra.client, orchestra.serve"
    heavy = sorted(WORKER_ONLY_IMPORTS)
    script = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# === files ===


def test_files_stay_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in tree_files()
        if path.suffix in {".rs", ".py", ".pyi", ".proto"} and not is_generated(path)
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    ]
    assert long == [], f"split them: {MAX_FILE_LINES} lines is the limit"


def test_files_hold_nothing_that_does_not_belong() -> None:
    here = Path(__file__).resolve()
    found = [
        f"{path.relative_to(ROOT)}:{number}: {text} ({reason})"
        for path in tree_files()
        if path != here
        and (path.suffix in SOURCE_SUFFIXES or path.name in {"Makefile", "run", "gates"})
        and not path.is_relative_to(ROOT / "examples/data")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for text, reason in FORBIDDEN_TEXT.items()
        if text in line
    ]
    assert found == []


def test_no_file_is_large() -> None:
    megabytes = {
        str(path.relative_to(ROOT)): path.stat().st_size / 2**20
        for path in tree_files()
        if path.suffix != ".safetensors" and path.stat().st_size > 2 * 2**20
    }
    assert megabytes == {}


# === documents ===


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_document_is_linked(path: Path) -> None:
    name = str(path.relative_to(ROOT / "docs"))
    from_readme = f"(docs/{name})" in (ROOT / "README.md").read_text()
    from_map = f"({name})" in (ROOT / "docs/architecture.md").read_text()
    assert from_readme or from_map


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)} -> {target}"
        for path in tree_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_every_public_make_target_has_a_help_line() -> None:
    makefile = (ROOT / "Makefile").read_text()
    public = re.findall(r"^\.PHONY: (help .*)$", makefile, re.MULTILINE)[0].split()
    helped = re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE)
    assert sorted(public) == sorted(helped)


def test_documents_name_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in tree_files():
        if path.suffix == ".md":
            named = set(re.findall(r"(?:`|^\$ |^)make ([a-z-]+)", path.read_text(), re.MULTILINE))
            assert named <= targets, path.relative_to(ROOT)


def test_every_dependency_says_why() -> None:
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]
    crates = {name for name in workspace["dependencies"] if not name.startswith("orchestra-")}
    project = pyproject()
    extras = project["optional-dependencies"]
    base = project["dependencies"]
    assert isinstance(base, list)
    assert isinstance(extras, dict)
    requirements = [*base, *(line for extra in extras.values() for line in extra)]
    packages = {re.split(r"[<>=!~; \[]", line)[0] for line in requirements}
    rows = re.findall(
        r"^\| `([^`]+)` \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE
    )
    assert set(rows) == crates | packages
    assert len(rows) == len(set(rows)) or crates & packages


def test_every_workspace_dependency_is_used() -> None:
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]
    used = set().union(*(direct_dependencies(package) for package in cargo_packages().values()))
    assert workspace["dependencies"].keys() - used == set()


def test_development_dependencies_are_exact() -> None:
    extras = pyproject()["optional-dependencies"]
    assert isinstance(extras, dict)
    assert [line for line in extras["dev"] if "==" not in line] == []
