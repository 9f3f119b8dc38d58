"""Random flags and damaged pictures: no traceback and no hang; not a test of the suite.

python tests/fuzz.py flags --count 300       random flags for train.py and evaluate.py
python tests/fuzz.py pictures --count 2000   mutated pictures and label maps, as files are read

Each case may end well or with one line for the user. Prints the others, and exits with 1.
"""

import contextlib
import io
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluate
import train
from clip_loader import Tokenizer, save_checkpoint
from conftest import TINY
from model import CLIP, DenseCLIP, InputError

PHOTOGRAPHS = Path(__file__).parent / "golden/pipeline/voc_like/JPEGImages"
NUMBERS = ["0", "1", "2", "8", "16", "64", "224", "0.5", "1e9", "-1", "nan", "inf", "x", ""]


def flags_of(program):
    """The options of a program: (names, how many values, choices)."""
    parser = evaluate.Parser()
    program.add_arguments(parser)
    skip = (
        "--patch-size",
        "--image-size",
        "--help",
        "--output",
        "--device",
        "--workers",
        "--epochs",
        "--compile",
    )
    return [a for a in parser._actions if a.option_strings[-1] not in skip]


def random_flags(rng, program, always, words):
    """A few random options, with values that are right and wrong."""
    flags = list(always)
    for action in rng.sample(flags_of(program), rng.randint(1, 5)):
        flags.append(rng.choice(action.option_strings))
        values = list(map(str, action.choices or ("1", "2", "8", "16")))
        if rng.random() < 0.3:
            values += [*NUMBERS, *words]
        if action.nargs != 0 and rng.random() < 0.95:
            flags += [rng.choice(values)]
    return flags


def try_flags(rng, folder):
    """-> a function that tries random flags."""
    tokenizer = Tokenizer(["a t", "c at</w>"])
    config = train.dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    checkpoint = folder / "clip.pt"
    save_checkpoint(checkpoint, DenseCLIP(CLIP(config)), merges=tokenizer.merges)
    words = [str(checkpoint), str(PHOTOGRAPHS), str(next(PHOTOGRAPHS.iterdir())), "cat,dog"]
    words += ["nowhere", "/dev/null", str(folder), "synthetic", "\ud800", "a\nb", "no,\x00"]
    small = ["--workers", "0", "--device", "cpu", "--output", str(folder / "o")]
    to_evaluate = [*small, "--checkpoint", str(checkpoint), "--limit", "2"]
    to_train = [*small, "--batch-size", "4", "--steps", "2"]

    def case():
        program, always = rng.choice([(evaluate, to_evaluate), (train, to_train)])
        flags = random_flags(rng, program, always, words)
        return f"{program.__name__}.py {flags}", lambda: program.main(flags)

    return case


def try_pictures(rng, folder):
    """-> a function that damages a picture and reads it as an image and as a label map."""
    table = data.value_table(range(21))
    originals = []
    for path in sorted(PHOTOGRAPHS.iterdir())[:3]:
        image = Image.open(path).reduce(8)
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"):
            file = io.BytesIO()
            image.convert("P" if kind in ("GIF", "TIFF") else "RGB").save(file, kind)
            originals.append(file.getvalue())

    def case():
        content = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 20)):
            content[rng.randrange(min(len(content), rng.choice([64, 10**9])))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path = folder / "picture.png"

        def read():
            path.write_bytes(content)
            for function in (data.read_image, read_as_label):
                with contextlib.suppress(InputError):
                    function(path)

        return f"a picture of {len(content)} bytes, {bytes(content[:16])}", read

    def read_as_label(path):
        data.read_label(path, np.zeros((10, 10, 3), np.uint8), table)

    return case


def main():
    parser = evaluate.Parser(__doc__)
    parser.add_argument("what", choices=["flags", "pictures"])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60, help="of a case, after which it hangs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    rng = random.Random(args.seed)
    failures = 0
    ends = {"well": 0, "one line": 0}
    with tempfile.TemporaryDirectory() as folder:
        make_case = {"flags": try_flags, "pictures": try_pictures}[args.what](rng, Path(folder))
        for _ in range(args.count):
            name, case = make_case()
            signal.alarm(args.seconds)
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    case()
                ends["well"] += 1
            except (InputError, OSError) as error:
                if "\n" in str(error):
                    failures += 1
                    print(f"{name!r}: more than one line: {error!r}")
                ends["one line"] += 1
            except SystemExit:  # --help
                ends["well"] += 1
            except Exception:
                failures += 1
                print(f"{name!r}\n{traceback.format_exc()}")
            finally:
                signal.alarm(0)
    print(f"{args.count} cases: {ends}, {failures} failures")
    sys.exit(failures > 0)


def hang(*_):
    raise RuntimeError("a hang")


if __name__ == "__main__":
    evaluate.run_program(main, "stopped")
