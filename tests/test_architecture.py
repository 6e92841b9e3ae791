"""The walls of the house: imports go one way, families do not import each other, no forbidden library."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "omnilatent"
FAMILIES = {"autoencoders", "organic", "omni", "world", "diffusion"}
# Lower rooms stand first: a file may import from its own rank's room and from any lower rank.
RANKS = [{"errors", "devices", "latent", "codec", "hub", "download"}, {"data"}, {"nn"}, {"losses", "quantizers"},
         {"metrics"}, {"store", "report"}, {"training"}, FAMILIES, {"cli", "__main__"}]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
SIBLINGS = {("diffusion", "organic")}
FORBIDDEN = {"torchvision", "torchaudio", "torchcodec", "timm", "lpips"}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def absolute_stem(path: Path, node: ast.ImportFrom) -> str:
    """The dotted name that `from … import` takes from, relative ones resolved."""
    package = ["omnilatent", *path.relative_to(SOURCE).parts[:-1]]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def imported_modules(path: Path) -> list[str]:
    """Absolute dotted names of all imports in a file, those inside functions included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = absolute_stem(path, node)
            names += [f"{stem}.{alias.name}" for alias in node.names] if stem == "omnilatent" else [stem]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    here = room_of(path)
    for name in imported_modules(path):
        if name.split(".")[0] in FORBIDDEN:
            pytest.fail(f"{path} imports {name}, which does not load beside the CPU build of torch")
        parts = name.split(".")
        if parts[0] != "omnilatent" or len(parts) < 2 or here == "__init__":
            continue
        there = parts[1]
        if there in {"__version__", here}:
            continue
        assert there in RANK, f"{path} imports {name}: the room {there} has no rank"
        assert RANK[there] <= RANK[here], f"{path} ({here}) imports upwards from {there}"
        if here in FAMILIES and there in FAMILIES:
            assert (here, there) in SIBLINGS, f"the family {here} imports the family {there}"


def test_every_room_has_a_rank() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__", "weights"}
    assert rooms <= set(RANK), rooms - set(RANK)


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports for types and those inside functions count: files that need each other are one file, or lack a third."""
    names = {".".join(["omnilatent", *path.relative_to(SOURCE).with_suffix("").parts]): path for path in FILES}
    needs = {name: _files_imported(path) & set(names) for name, path in names.items()}
    for name in names:
        seen: set[str] = set()
        ahead = [name]
        while ahead:
            new = needs[ahead.pop()] - seen
            seen |= new
            ahead += new
        assert name not in seen, f"{name} imports itself by way of other files"
    assert "omnilatent.data.protocols" in needs["omnilatent.data.splits"]  # the check sees relative imports


def _files_imported(path: Path) -> set[str]:
    """Dotted names that a file imports from, each also with the name taken from it, which may be a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            stem = absolute_stem(path, node)
            found |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(("room", "line", "refusal"), [
    ("data", "from ..training import loop", "imports upwards from training"),
    ("losses", "from omnilatent.metrics.pixel import psnr", "imports upwards from metrics"),
    ("data", "from .. import cli", "imports upwards from cli"),
    ("organic", "from ..autoencoders.kl import KL", "the family organic imports the family autoencoders"),
    ("data", "import torchvision.ops", "does not load beside the CPU build"),
    ("data", "from ..misc import x", "the room misc has no rank"),
])
def test_the_check_refuses(
    room: str, line: str, refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    file = tmp_path / room / "file.py"
    file.parent.mkdir()
    file.write_text(f"def inside():\n    {line}\n", encoding="utf-8")
    with pytest.raises((AssertionError, pytest.fail.Exception), match=refusal):
        test_imports_go_one_way(file)
