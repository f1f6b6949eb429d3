"""The rules of the house: who may import whom, what the wheel holds, how long a function may be."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"mstkd": "mstkd", "launch": "mstkd.launch", "shards": "mstkd.shards", "slurm": "mstkd.slurm"}
HEAVY = {"torch", "deepspeed", "mlflow", "numpy", "nibabel", "submitit", "webdataset", "monai"}
MAX_FUNCTION_LINES, MAX_FILE_LINES = 50, 400


def module_name(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[top], *(part for part in rest if part != "__init__")])


SOURCES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}
TESTS = {path.name: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}


def imported(tree: ast.AST, top_level_only: bool = False) -> set[str]:
    """Dotted names of all that a module imports; `from a import b` counts as a and a.b."""
    names = set()
    for node in _outside_functions(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _outside_functions(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside_functions(child)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def own(names: set[str]) -> set[str]:
    """The project's modules among `names`."""
    found = {name if name in SOURCES else name.rpartition(".")[0] for name in names if within(name, {"mstkd"})}
    return found & set(SOURCES)


def modules_of(*packages: str) -> list[str]:
    return [module for module in SOURCES if within(module, set(packages))]


def test_the_import_scan_sees_all_forms():
    tree = ast.parse("import a.b\nfrom c import d\nif x:\n    import e\ndef f():\n    import g\nclass C:\n    import h\n")
    assert imported(tree) == {"a.b", "c", "c.d", "e", "g", "h"}
    assert imported(tree, top_level_only=True) == {"a.b", "c", "c.d", "e", "h"}


# Which of the project's own modules a package may import besides itself, anywhere in its files.
MAY_IMPORT = {
    "mstkd.errors": set(),
    "mstkd.files": set(),
    "mstkd.batch": set(),
    "mstkd.recipe": {"mstkd.errors"},
    "mstkd.config": {"mstkd.errors", "mstkd.recipe"},
    "mstkd.subsets": {"mstkd.errors"},
    "mstkd.targets": {"mstkd.errors", "mstkd.shards.spec"},
    "mstkd.losses": {"mstkd.models"},
    "mstkd.models": {"mstkd.losses"},
    "mstkd.methods": {
        "mstkd.models", "mstkd.losses", "mstkd.batch", "mstkd.config", "mstkd.recipe", "mstkd.errors", "mstkd.shards.spec", "mstkd.data.intensity",
        "mstkd.targets", "mstkd.subsets",
    },
    "mstkd.data": {
        "mstkd.batch", "mstkd.config", "mstkd.errors", "mstkd.files", "mstkd.subsets", "mstkd.shards.spec", "mstkd.shards.members", "mstkd.shards.layout",
        "mstkd.shards.tar_walk", "mstkd.shards.clahe",
    },
    "mstkd.track": {"mstkd.config", "mstkd.recipe", "mstkd.errors", "mstkd.files"},
    "mstkd.shards": {"mstkd.errors", "mstkd.files", "mstkd.config", "mstkd.recipe"},
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    for module in modules_of(package):
        foreign = {name for name in own(imported(TREES[module])) if not within(name, MAY_IMPORT[package] | {package})}
        assert not foreign - {"mstkd"}, f"{module} imports {sorted(foreign)}"


@pytest.mark.parametrize("package", ["mstkd.losses", "mstkd.models"])
def test_networks_and_losses_import_torch_and_monai_only(package):
    for module in modules_of(package):
        names = {name.partition(".")[0] for name in imported(TREES[module])} - set(sys.stdlib_module_names)
        assert names <= {"torch", "monai", "mstkd"}, module


def test_launch_imports_only_light_modules_at_module_level():
    for module in modules_of("mstkd.launch"):
        names = imported(TREES[module], top_level_only=True)
        assert not {name for name in own(names) if not within(name, {"mstkd.config", "mstkd.recipe", "mstkd.errors", "mstkd.files", "mstkd.attempts", "mstkd.launch"})}, module
        assert not {name for name in names if within(name, HEAVY)}, module


def test_the_engine_knows_the_method_protocol_and_no_method():
    for module in modules_of("mstkd.engine"):
        names = own(imported(TREES[module]))
        assert not {name for name in names if name.startswith("mstkd.methods.")}, module
        assert not {name for name in names if within(name, {"mstkd.models", "mstkd.losses", "mstkd.launch", "mstkd.train"})}, module


def test_nothing_but_launch_imports_launch():
    for module in set(SOURCES) - set(modules_of("mstkd.launch")):
        assert not {name for name in imported(TREES[module]) if within(name, {"mstkd.launch"})}, module


def test_methods_never_ask_for_a_rank():
    for module in modules_of("mstkd.methods", "mstkd.models", "mstkd.losses"):
        assert not {name for name in imported(TREES[module]) if within(name, {"torch.distributed", "deepspeed"})}, module
        attributes = {ast.unparse(node) for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
        assert not {name for name in attributes if within(name, {"torch.distributed"})}, module


def test_deepspeed_is_imported_in_one_place():
    users = {module for module in SOURCES if any(within(name, {"deepspeed"}) for name in imported(TREES[module]))}
    assert {user for user in users if not within(user, {"mstkd.engine.backend"})} == set()


def test_nobody_imports_a_folder_by_its_own_name():
    # from the checkout's root it works, and gives every class a second time
    for name, tree in {**TREES, **TESTS}.items():
        assert not {found for found in imported(tree) if within(found, {"launch", "shards", "slurm"})}, name


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, mstkd.launch.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded and not HEAVY & set(loaded)


@pytest.mark.parametrize("module", SOURCES)
def test_functions_and_files_stay_readable(module):
    assert len(SOURCES[module].read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{module}.{node.name}"


# packaging


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_python_files_is_a_listed_package():
    on_disk = {FOLDERS[parts[0]] + "".join(f".{part}" for part in parts[1:]) for parts in {
        path.parent.relative_to(ROOT).parts for path in SOURCES.values() if "devcluster" not in path.parts
    }}  # fmt: skip
    assert on_disk | {"mstkd.slurm"} == set(project()["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names in a wheel really built from a copy of the tree."""
    copy = tmp_path_factory.mktemp("checkout") / "mstkd"
    copy.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = (copy / "dist").glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_the_wheel_holds_every_module(wheel):
    expected = {
        str(Path(FOLDERS[path.relative_to(ROOT).parts[0]].replace(".", "/"), *path.relative_to(ROOT).parts[1:]))
        for path in SOURCES.values() if "devcluster" not in path.parts
    }  # fmt: skip
    assert expected == {name for name in wheel if name.endswith(".py")}


@pytest.mark.parametrize(
    ("pattern", "installed"),
    [
        ("launch/recipes/*.yaml", "mstkd/launch/recipes"),
        ("launch/constraints.txt", "mstkd/launch"),
        ("shards/specs/*.yaml", "mstkd/shards/specs"),
        ("slurm/*.sbatch", "mstkd/slurm"),
        ("slurm/clusters/*.yaml", "mstkd/slurm/clusters"),
        ("slurm/devcluster/*", "mstkd/slurm/devcluster"),
        ("mstkd/py.typed", "mstkd"),
        ("mstkd/compare/*.html.j2", "mstkd/compare"),
        ("mstkd/compare/*.yaml", "mstkd/compare"),
        ("mstkd/evaluate/*.html.j2", "mstkd/evaluate"),
        ("mstkd/report/*.html.j2", "mstkd/report"),
        ("mstkd/report/*.css", "mstkd/report"),
        ("mstkd/report/*.js", "mstkd/report"),
    ],
)
def test_the_wheel_holds_the_data_files(wheel, pattern, installed):
    files = {f"{installed}/{path.name}" for path in ROOT.glob(pattern)}
    assert files and files <= wheel


def test_the_wheel_holds_the_licence_and_the_command(wheel):
    assert any(re.fullmatch(r"mstkd-.*\.dist-info/licenses/LICENSE", name) for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)
    assert {name.partition("/")[0] for name in wheel if ".dist-info" not in name} == {"mstkd"}


def test_the_scripts_are_valid_bash():
    devcluster = [path for path in (ROOT / "slurm" / "devcluster").iterdir() if path.suffix != ".in"]
    for script in [*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "launch").glob("*.sh"), *devcluster]:
        subprocess.run(["bash", "-n", script], check=True)
