"""What the README promises: the names that it points to are there, and the programs take the flags that it gives them."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train

README = Path(__file__).parents[1].joinpath("README.md").read_text()
# "`losses.py`: `total_loss`, `GatherRows`" -> ("losses", "`total_loss`, `GatherRows`")
PLACES = re.findall(r"`(\w+)\.py`: ((?:`[\w.]+`(?:, )?)+)", README)
COMMANDS = re.findall(r"(?:python|torchrun [^`\n]*?) ?(train|evaluate)\.py([^`\n&]*)", README)


def test_each_equation_is_where_the_readme_says():
    assert len(PLACES) > 20
    for file, names in PLACES:
        for name in re.findall(r"[\w.]+", names):
            found = importlib.import_module(file)
            for part in name.split("."):
                assert hasattr(found, part), f"{file}.py has no {name}"
                found = getattr(found, part)
    rows = "".join(line for line in README.splitlines() if line.startswith("| Eq"))
    said = {
        int(n)
        for first, last in re.findall(r"Eqs?\. (\d+)(?:-(\d+))?", rows)
        for n in range(int(first), int(last or first) + 1)
    }
    assert said == set(range(1, 11))


@pytest.mark.parametrize("program, flags", sorted(set(COMMANDS)))
def test_the_programs_take_the_readmes_flags(program, flags):
    flags = [flag for flag in shlex.split(flags, comments=True) if flag != "--help"]
    if flags[-1:] == ["..."] and flags[-2:-1] != ["--data"]:  # "and so on"
        flags.pop()
    {"train": train, "evaluate": evaluate}[program].parse_args(flags)  # which ends the program if there is no such flag
