"""Arrival processes against their distributions, traces against what their lines say."""

import json

import numpy as np
import pytest
from scipy.stats import expon, gamma, kstest

from optpipe.bench.scenario import BUNDLED_TRACE
from optpipe.bench.serving.arrivals import BLOCK, Scale, lengths, prompt_ids, read_trace, times_s
from optpipe.errors import InputError


@pytest.mark.parametrize("shape", [1.0, 0.25])
def test_gaps_have_the_distribution_they_should(shape):
    gaps = np.diff(times_s(8.0, shape, 5001, np.random.default_rng(0)), prepend=0.0)
    law = expon(scale=1 / 8) if shape == 1 else gamma(shape, scale=1 / (8 * shape))
    assert kstest(gaps, law.cdf).pvalue > 0.01
    spread = gaps.var() / gaps.mean() ** 2
    assert spread == pytest.approx(1 / shape, rel=0.15), "bursts"


def test_the_rate_is_not_forced():
    """Counts in a second are Poisson: their variance is their mean, which rescaling destroys."""
    rng = np.random.default_rng(1)
    ends = [times_s(10.0, 1.0, 100, rng)[-1] for _ in range(500)]
    assert np.std(ends) == pytest.approx(1.0, rel=0.15), "sum of 100 gaps: 10 s, deviation 1 s"


def test_lengths():
    rng = np.random.default_rng(0)
    assert set(lengths(7, 0, 5, rng)) == {7}
    drawn = lengths(1000, 0.5, 20_000, rng)
    assert drawn.min() >= 1 and drawn.max() == 1000
    assert np.median(drawn) == pytest.approx(500, rel=0.02)
    assert np.log(drawn[drawn < 500]).min() < np.log(500) - 1


def line(**fields):
    known = {"timestamp": 5, "input_length": 600, "output_length": 10, "hash_ids": [3, 4]}
    return json.dumps(known | fields)


def trace(tmp_path, *lines):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_a_trace_is_scaled_in_time_and_length(tmp_path):
    file = trace(tmp_path, line(), "", line(timestamp=2005, hash_ids=[3, 9], extra=1))
    first, second = read_trace(file, Scale(time=0.5, length=0.25))
    assert (first.time_s, first.prompt_tokens, first.new_tokens) == (0.0025, 150, 2)
    assert (second.line, second.time_s, second.hash_ids) == (3, 1.0025, (3, 9))
    assert read_trace(file, Scale())[0].prompt_tokens == 600


def test_equal_hash_ids_are_equal_tokens(tmp_path):
    rows = read_trace(
        trace(tmp_path, line(), line(hash_ids=[3, 9]), line(hash_ids=[8, 4])), Scale()
    )
    one, two, three = (prompt_ids(row, Scale(), 288, [0]) for row in rows)
    assert len(one) == len(two) == 600
    assert (one[:512] == two[:512]).all() and (one[512:] != two[512:]).any()
    assert (one[:512] != three[:512]).any() and (one[512:] == three[512:]).all()
    assert (one != prompt_ids(rows[0], Scale(), 288, [1])).any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: not a JSON object"),
        (line(timestamp=None), r"line 2: 'timestamp' must be a number from 0 to 1e\+15, got None"),
        (line(timestamp=float("nan")), "line 2: 'timestamp' must be"),
        (line(timestamp=0).replace(": 0,", ": 1e400,"), "line 2: 'timestamp' .* got inf"),
        (line(output_length=10**400), "line 2: 'output_length' must be"),
        (line(output_length=0), r"line 2: 'output_length' must be a number from 1 to 1e\+15"),
        (line(input_length="many"), "line 2: 'input_length' must be"),
        (line(hash_ids=[1]), r"line 2: 1 hash_ids for an input_length of 600: .* are 2"),
        (line(hash_ids=["a", "b"]), "line 2: 'hash_ids' must be"),
        (line(timestamp=4), "line 2: its timestamp is before"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(InputError, match=message) as caught:
        read_trace(trace(tmp_path, line(), bad), Scale())
    assert "\n" not in str(caught.value)


def test_a_trace_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "none.jsonl", Scale())
    with pytest.raises(InputError, match="holds no request"):
        read_trace(trace(tmp_path, ""), Scale())


def synthetic_trace(requests=48, seed=0):
    """The lines of the bundled ``trace.jsonl``: three conversations that share their system prompt.

    Gaps are exponential, 400 ms on average. Every turn repeats the whole conversation before it
    and adds 1 to 900 tokens; answers are lognormal around 120 tokens. A conversation of
    more than 11 blocks (5632 tokens) begins anew.
    """
    rng = np.random.default_rng(seed)
    now_ms, fresh = 0.0, 2
    talks = [(2 * BLOCK, [0, 1])] * 3
    for _ in range(requests):
        now_ms += rng.exponential(400)
        which = int(rng.integers(len(talks)))
        length, hashes = talks[which]
        if length > 11 * BLOCK:
            length, hashes = 2 * BLOCK, [0, 1]
        kept = hashes[: length // BLOCK]  # the last one, if not full, now holds other tokens
        length += int(rng.integers(1, 900))
        new = -(-length // BLOCK) - len(kept)
        hashes = [*kept, *range(fresh, fresh + new)]
        fresh += new
        talks[which] = (length, hashes)
        answer = int(np.clip(np.rint(120 * np.exp(0.6 * rng.standard_normal())), 8, 512))
        row = {"timestamp": round(now_ms), "input_length": length, "output_length": answer}
        yield json.dumps({**row, "hash_ids": hashes})


def test_the_bundled_trace_is_what_its_function_makes():
    assert BUNDLED_TRACE.read_text().splitlines() == [*synthetic_trace()]
    rows = read_trace(BUNDLED_TRACE, Scale())
    seen = [set(row.hash_ids) for row in rows]
    shared = [len(ids & set().union(*seen[:n])) / len(ids) for n, ids in enumerate(seen) if n]
    assert len(rows) == 48 and np.mean(shared) > 0.5, "conversations repeat their past"
