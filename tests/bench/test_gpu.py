"""Physics of a real GPU (T15), and agreement with Triton and with CUDA events of our own (T14).

    pytest -m gpu tests/bench/test_gpu.py

needs torch with CUDA and Triton, and a GPU that nobody else is using.
"""

import statistics

import pytest
import torch

from optpipe.bench.bottlenecks import ceilings, roofline
from optpipe.bench.bottlenecks.cost import Model, Product
from optpipe.bench.bottlenecks.roofline import Step

pytestmark = pytest.mark.gpu
ROWS, COLS = 16384, 32768  # 1 GiB in bfloat16: no cache of any GPU holds it
ROUNDS = 20


def events_s(call):
    """Median seconds of one call by CUDA events around each, after warm-up."""
    for _ in range(5):
        call()
    pairs = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


@pytest.fixture(scope="module")
def measured():
    return ceilings.measure_gpu()


def test_a_gemv_of_half_the_bytes_takes_half_the_time():
    """T15: bfloat16 against int8 weights, time ratio within 10 % of the byte ratio."""
    from row_sums import row_sums  # needs Triton

    weight = torch.randint(-8, 8, (ROWS, COLS), dtype=torch.int8, device="cuda")
    half = weight.bfloat16()
    ones = torch.ones(COLS, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(row_sums(weight), row_sums(half)), "the same sums of small integers"
    ours = events_s(lambda: row_sums(half))
    assert ours == pytest.approx(events_s(lambda: half @ ones), rel=0.1), "as fast as cuBLAS"
    ratio = ours / events_s(lambda: row_sums(weight))
    print(f"time ratio {ratio:.3f} for a byte ratio of 2")
    assert ratio == pytest.approx(2, rel=0.1)


def test_the_elasticity_of_a_product_flips_near_the_ridge(measured):
    """T15: batches of 1, 4, 16 against 512 and 1024, around some 250 FLOPs a byte."""
    width = 8192
    weight = torch.randn(width, width, device="cuda", dtype=torch.bfloat16)
    layer = Product(rows=width, cols=width, bytes=2 * width * width, dtype="bfloat16")
    stack = Model(
        products=(layer,), vector_bytes=0.0, hidden=0, tables=0, heads=1, kv_heads=1, head_dim=1,
        windows=(), dtype="bfloat16", capacity=1, cache="in place",
    )  # fmt: skip
    steps = []
    for batch in (1, 4, 16, 512, 1024):
        x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
        seconds = events_s(lambda x=x: torch.nn.functional.linear(x, weight))
        used = roofline.use(stack.step(batch, 1, 0), seconds, measured)
        steps.append(Step(use=used, tokens=batch))
        print(f"{batch} rows: {seconds * 1e6:.1f} us, MBU {used.mbu:.2f}, MFU {used.mfu:.2f}")
    one, four, sixteen, many, more = steps
    assert roofline.by_elasticity(one, four)[0] == "memory"
    assert roofline.by_elasticity(four, sixteen)[0] == "memory"
    assert roofline.by_elasticity(many, more)[0] == "compute"
    assert roofline.by_intensity(sixteen.use)[0] == "memory"
    assert roofline.by_intensity(more.use)[0] == "compute"
    assert 20 < sixteen.use.ridge < 1000


def test_our_events_agree_with_triton(measured):
    """T14: the median of one large product and of one large copy within 2 % of do_bench."""
    from triton.testing import do_bench

    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**28, device="cuda")  # 1 GiB
    target = torch.empty_like(source)
    for call in (lambda: x @ x, lambda: target.copy_(source)):
        theirs = do_bench(call, warmup=200, rep=500, return_mode="median") / 1e3
        ours = events_s(call)
        print(f"ours {ours * 1e3:.3f} ms, do_bench {theirs * 1e3:.3f} ms")
        assert ours == pytest.approx(theirs, rel=0.02)


def test_a_copy_of_two_gigabytes_reaches_the_measured_bandwidth(measured):
    """T14: not 3 % below the same copy launched back to back, nor above the ceiling."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    reached = 2 * source.nbytes / events_s(lambda: target.copy_(source))
    copied = ceilings._gpu_rate(lambda: (lambda: target.copy_(source), 2.0 * source.nbytes))
    ceiling = measured.bytes_per_s(2.0 * source.nbytes)
    print(f"copy {reached / 1e12:.2f} TB/s, ceiling {ceiling / 1e12:.2f}")
    assert 0.97 * copied <= reached <= 1.05 * ceiling
