"""The programs of tests/ that the docs name run from start to end, on tiny sizes."""

import importlib
import sys

import pytest
import torch

import evaluate
from test_evaluate import save_tiny

COMMANDS = {  # what of their output says that they came to the end
    "benchmark.py evaluate --smoke": "s per image",
    "benchmark.py train --smoke": "s per step",
    "benchmark.py loader --smoke": "pairs/s",
    "benchmark.py pacl --smoke": "times less memory",
    "ablate.py --rows default --steps 2 --seeds 1 --limit 4 --output {folder}": "| 52.60 |",
    "photographs.py --images 2 --val 1 --output {folder}": "2 images for training",
    "fuzz.py flags --count 3": "0 failures",
    "fuzz.py pictures --count 20": "0 failures",
    "analyse.py --checkpoint {checkpoint} --limit 4": "regions per image",
    "analyse.py --checkpoint {checkpoint} --limit 4 --coherence": "area under the ROC curve",
}


@pytest.mark.parametrize("program", ["ablate", "benchmark", "fuzz", "photographs"])
def test_a_wrong_flag_is_one_line(program, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--toaster"])
    module = importlib.import_module(program)
    with pytest.raises(SystemExit):
        evaluate.run_program(module.main, "stopped")
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_program(command, tmp_path, monkeypatch, capfd):
    checkpoint = save_tiny(tmp_path / "checkpoint.pt")
    program, *flags = command.format(folder=tmp_path, checkpoint=checkpoint).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    module = importlib.import_module(program.removesuffix(".py"))  # a process would import torch
    threads = torch.get_num_threads()
    try:
        module.main()
    except SystemExit as ended:
        assert not ended.code
    finally:
        torch.set_num_threads(threads)
    assert COMMANDS[command] in capfd.readouterr().out
