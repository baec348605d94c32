"""When two thin products take less time than the one they replace, on a GPU: run it as a script.

For every shape and number of tokens: the time of left (R, K) @ right (K, C) @ x over that of W @ x,
float16, with K such that the factors have a share of W's parameters. Each is captured in a CUDA
graph over copies of the weights that together exceed the cache, as an engine runs them; medians of
turns that alternate.
"""

import statistics

import torch
from torch.nn.functional import linear

SHAPES = ((4096, 4096), (14336, 4096), (1024, 4096), (2048, 2048))
TOKENS = (1, 16, 256, 2048)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CACHE = 200e6
"""Bytes of weights that one graph reads; an H100 caches 50e6."""


def captured(layers, x):
    """What sends x through every layer, a list of weights, by a graph."""

    def run():
        for weights in layers:
            y = x
            for weight in weights:
                y = linear(y, weight)

    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        run()
    return lambda: (graph.replay(), layers)  # the graph holds addresses alone, so hold the weights


def seconds(replay):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def weights(*shapes):
    return [torch.randn(shape, device="cuda", dtype=torch.float16) for shape in shapes]


def ratios(rows, cols, tokens):
    """For each of SHARES: time of two products over that of one."""
    copies = max(int(CACHE / (2 * rows * cols)), 2)
    x = torch.randn(tokens, cols, device="cuda", dtype=torch.float16)
    one = captured([weights((rows, cols)) for _ in range(copies)], x)
    for share in SHARES:
        rank = int(share * rows * cols / (rows + cols)) // 32 * 32
        two = captured([weights((rank, cols), (rows, rank)) for _ in range(copies)], x)
        turns = [(seconds(two), seconds(one)) for _ in range(40)][5:]
        times = [statistics.median(side) for side in zip(*turns, strict=True)]
        yield times[0] / times[1]


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "time of two products / time of one")
    print(f"{'R x C':>14} {'tokens':>6} " + " ".join(f"{share:6.2f}" for share in SHARES))
    for rows, cols in SHAPES:
        for tokens in TOKENS:
            found = " ".join(f"{ratio:6.2f}" for ratio in ratios(rows, cols, tokens))
            print(f"{rows:6} x {cols:5} {tokens:6} {found}", flush=True)
