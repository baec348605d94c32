"""An artifact that this machine cannot run costs the run nothing but its own numbers."""

from optpipe.bench import report
from optpipe.bench.fidelity import gate
from optpipe.bench.run import _whole, measure_arms
from optpipe.bench.scenario import Scenario
from optpipe.bench.timed.measure import BenchConfig


def test_it_is_never_loaded_and_the_report_says_why(arm):
    why = "package 'vllm' is not installed"
    given = [arm("baseline"), arm("b", missing=why, fault="die_loading")]
    scenarios = {"single": Scenario(prompt_tokens=[4], new_tokens=2)}
    found = measure_arms(given, BenchConfig(blocks=1), scenarios, lambda *_: None)
    assert found.left_out == {"b": f"not benchmarked: {why}"}
    assert found.judged.scored.keys() == {"baseline"}
    assert "b" not in {sample.arm for sample in found.measured.samples}
    built = report.build(found, {"bench": {}})
    entry = next(a for a in built["artifacts"] if a["name"] == "b")
    assert entry["bytes"] == 1000 and entry["reasons"]["load_s"] == f"not benchmarked: {why}"
    _whole(found)  # no StageError: nothing broke
    gate.check(built, BenchConfig().quality, [])
