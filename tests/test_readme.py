"""README.md and docs/*.md: names, flags and places exist, commands are understood."""

import contextlib
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
ALL = "\n".join(PAGES.values())
PROGRAMS = "train evaluate tests/ablate tests/analyse tests/benchmark tests/photographs".split()


def parse_args(program, flags):
    return importlib.import_module(program.removeprefix("tests/")).parse_args(flags)


def test_every_name_exists():
    # "`losses.py`: `total_loss`, `Pairs.row`" -> ("losses", "`total_loss`, `Pairs.row`")
    places = re.findall(r"`(?:tests/)?(\w+)\.py`: ((?:`[\w.]+`(?:, )?)+)", ALL)
    assert len(places) > 10
    for file, names in places:
        for name in re.findall(r"[\w.]+", names):
            found = importlib.import_module(file)
            for part in name.split("."):
                assert hasattr(found, part), f"{file}.py has no {name}"
                found = getattr(found, part)


def test_every_flag_exists(capsys):
    for program in PROGRAMS:
        with contextlib.suppress(SystemExit):
            parse_args(program, ["--help"])
    flag = r"(?<![\w-])--[a-z][\w-]*"
    known = {*re.findall(flag, capsys.readouterr().out), "--nproc_per_node"}  # of torchrun
    assert not {*re.findall(flag, ALL)} - known


# "python evaluate.py --images x" -> ("evaluate", " --images x")
COMMANDS = re.findall(rf"(?:python|torchrun [^`\n]*?) ?({'|'.join(PROGRAMS)})\.py([^`\n&;]*)", ALL)


@pytest.mark.parametrize("program, flags", sorted(set(COMMANDS)))
def test_every_command_is_understood(program, flags):
    flags = shlex.split(flags, comments=True)
    # "..." is a value, or "and so on"
    flags = [x for before, x in zip(["", *flags], flags) if x != "..." or before.startswith("--")]
    if "--help" not in flags:
        parse_args(program, flags)  # or raises


def test_every_equation_has_its_place():
    page = PAGES[ROOT / "docs/paper-to-code.md"]
    rows = "".join(line for line in page.splitlines() if line.startswith("| Eq"))
    covered = set()
    for first, last in re.findall(r"Eqs?\. (\d+)(?:-(\d+))?", rows):
        covered |= {*range(int(first), int(last or first) + 1)}
    assert covered == {*range(1, 11)}


def anchors(page):
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_link_leads_somewhere():
    for path, page in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", page):
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            if not target.startswith("https://"):
                assert linked.exists(), target
                assert not anchor or anchor in anchors(PAGES[linked]), target


def test_the_readme_says_how_long_the_files_are():
    """To 5 %: "| `model.py` | 930 |"."""
    stated = dict(re.findall(r"^\| `(\w+)\.py` \| ([\d,]+) \|", ALL, re.MULTILINE))
    for file in "model losses clip_loader data train evaluate".split():
        lines = len((ROOT / f"{file}.py").read_text().splitlines())
        assert int(stated[file].replace(",", "")) == pytest.approx(lines, rel=0.05), file
