"""Records timings.npy: a fixed piece of work, one after the other, on a machine that others use.

python tests/bench/record.py [COUNT]
"""

import sys
import time
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "timings.npy"


def main(count: int) -> None:
    square, taken = np.ones((160, 160), dtype=np.float32), []
    for _ in range(count):
        start = time.perf_counter_ns()
        for _ in range(8):
            square @ square
        taken.append(time.perf_counter_ns() - start)
        time.sleep(0.01)  # a minute and a half in all: the load of the others changes
    np.save(FILE, np.array(taken, dtype=np.uint32) // 1000)  # microseconds


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
