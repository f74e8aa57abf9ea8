"""How much longer a run takes beside one other busy process on every core: `make bench`.

SmolLM2-135M in a process of its own, the default code, perplexity of one window and a calibration, without and with endless loops beside
it, turn by turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from surroundings import surroundings

WORK = """
import sys, time
import spikellm
sys.path.insert(0, {here!r})
from bench import HARDWARE, MODEL, spiking, windows
from spikellm.calibration.calibrate import calibrate
from spikellm.config.snn import PrefixConfig
from spikellm.evaluation.perplexity import perplexity
from spikellm.model.conversion import prepare
from spikellm.model.load import load_model

text = windows(4 * {tokens}).view(4, -1)
model, observed = spiking(text[:, :512], 8), load_model(MODEL, HARDWARE)
prepare(observed, rotation_seed=0, query_block=HARDWARE.query_block)
works = {{"perplexity": lambda: perplexity(model, text[:1], label=""), "calibration": lambda: calibrate(observed, text, PrefixConfig())}}
for name in works:
    works[name]()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    works[line.strip()]()
    print(time.perf_counter() - start, flush=True)
"""


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Within: so many processes that never wait."""
    with ExitStack() as stack:
        for _ in range(cores):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        time.sleep(0.5)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(surroundings(), flush=True)
    cores = len(os.sched_getaffinity(0))
    source = WORK.format(here=os.path.dirname(os.path.abspath(__file__)), tokens=arguments.window)
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None
        while answers.readline().strip() != "ready":
            pass

        def seconds(name: str) -> float:
            asked.write(name + "\n")
            asked.flush()
            return float(answers.readline())

        for name in ("perplexity", "calibration"):
            ratios = []
            for _ in range(arguments.repeats):
                alone = seconds(name)
                with busy(cores):
                    ratios.append(seconds(name) / alone)
            median = statistics.median(ratios)
            print(f"{name} beside {cores} endless loops / alone   {median:.2f}   ({min(ratios):.2f} to {max(ratios):.2f}; at most 2.5)")
        asked.close()


if __name__ == "__main__":
    main()
