"""README.md and docs/*.md: names exist, programs take the flags, links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
ALL = "\n".join(PAGES.values())
PAPER_TO_CODE = PAGES[ROOT / "docs" / "paper-to-code.md"]

# "`losses.py`: `total_loss`, `GatherRows`" -> ("losses", "`total_loss`, `GatherRows`")
PLACES = re.findall(r"`(?:tests/)?(\w+)\.py`: ((?:`[\w.]+`(?:, )?)+)", ALL)

# "python evaluate.py --image x.jpg" -> ("evaluate", " --image x.jpg"); "torchrun ...", too
COMMANDS = re.findall(
    r"(?:python|torchrun [^`\n]*?) ?(train|evaluate|tests/analyse)\.py([^`\n&;]*)", ALL
)
# `R` and `C` stand for a command in the table of the paper's ablations
SHORT = {
    "R": "--recipe paper --data ...",
    "C": "--recipe paper --data ... --reconstruction-weight 0 --superpixel-weight 0",
}
COMMANDS += [
    ("train", f"{SHORT[name]}{flags}")
    for name, flags in re.findall(r"`([RC])((?: --[^`\n]*)?)`", ALL)
]


def test_every_name_exists():
    assert len(PLACES) > 20
    for file, names in PLACES:
        for name in re.findall(r"[\w.]+", names):
            found = importlib.import_module(file)  # tests/analyse.py is found beside this file
            for part in name.split("."):
                assert hasattr(found, part), f"{file}.py has no {name}"
                found = getattr(found, part)


def test_every_equation_has_its_place():
    rows = "".join(line for line in PAPER_TO_CODE.splitlines() if line.startswith("| Eq"))
    covered = {
        number
        for first, last in re.findall(r"Eqs?\. (\d+)(?:-(\d+))?", rows)
        for number in range(int(first), int(last or first) + 1)
    }
    assert covered == set(range(1, 11))


@pytest.mark.parametrize("program, flags", sorted(set(COMMANDS)))
def test_every_command_has_known_flags(program, flags):
    flags = shlex.split(flags.split("-->")[0], comments=True)
    if "--help" in flags:
        return
    if flags[-1:] == ["..."] and flags[-2:-1] != ["--data"]:  # "and so on"
        flags.pop()
    module = importlib.import_module(program.removeprefix("tests/"))
    module.parse_args(flags)  # which exits for an unknown flag


def anchors(page):
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_link_leads_somewhere():
    for path, page in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", page):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            assert linked.exists(), f"{path.name}: {target}"
            if anchor:
                assert anchor in anchors(PAGES[linked]), f"{path.name}: {target}"
