"""An endpoint against a server with known delays and faults; see openai_server.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai_server
import pytest
import torch

from optpipe.artifact import Artifact
from optpipe.bench import endpoint, paged, vllm
from optpipe.bench.backend import BACKENDS, ENDPOINTS
from optpipe.bench.endpoint import GUARD, Endpoint
from optpipe.bench.resident import endpoints
from optpipe.bench.scenario import Objective, Scenario, Serving
from optpipe.bench.serving.feeds import Ask
from optpipe.bench.serving.live import UNANSWERED
from optpipe.bench.serving.serve import Serve
from optpipe.bench.trtllm import TrtllmEndpoint
from optpipe.bench.vllm import VllmEndpoint
from optpipe.bench.worker import Arm
from optpipe.errors import StageError

MS = 1_000_000
FIRST_S, TOKEN_S = 0.040, 0.008
LATE_S = 0.012
"""How much later a client on a busy machine may see a token."""
LOOSE = Objective(ttft_s=None, tpot_s=None, e2e_s=None)


class Fake(Endpoint):
    ask = VllmEndpoint.ask

    def command(self, artifact, port):
        plan = json.dumps(artifact.stats)
        return [sys.executable, "-S", "-u", openai_server.__file__, str(port), plan]


def start(folder, **plan):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda: "fake")
        return Fake(Artifact(path=folder, format="vllm", key="k", stats=plan), 1, "float32")


@pytest.fixture(scope="module")
def server(tiny):
    with start(tiny(), first_s=FIRST_S, token_s=TOKEN_S) as opened:
        yield opened


def ask(at_ms, new_tokens, *prompt):
    return Ask(at_ms * MS, np.array(prompt or (1, 2)), new_tokens)


def serve(server, *asks, max_batch=8, limit_s=5.0, clients=None):
    command = Serve(
        asks=asks, max_batch=max_batch, limit_s=limit_s, objective=LOOSE, clients=clients
    )
    return command(server)


def test_times_are_those_of_the_server(server):
    """Six at once, five tokens each: every one as if it were alone."""
    found = serve(server, *(ask(10 * n, 5, n, 1) for n in range(6)))
    each = [one.metrics() for one in found.requests]
    assert len(each) == 6 and {one.error for one in found.requests} == {None}
    assert FIRST_S <= min(one["ttft_s"] for one in each) < FIRST_S + LATE_S
    whole_s = FIRST_S + 4 * TOKEN_S
    assert whole_s <= min(one["e2e_s"] for one in each) < whole_s + LATE_S
    # a first token that is seen late makes the rest look quicker, so not the least of them
    assert np.median([one["tpot_s"] for one in each]) == pytest.approx(TOKEN_S, abs=LATE_S / 4)
    assert found.metrics["queue_s"] is None, "the server does not tell when it began"
    assert found.invalid == [] or found.invalid[0].startswith("client_bound")
    answers = {tuple((n + 1 + k) % 11 for k in range(5)) for n in range(6)}
    told = np.array(found.tokens).reshape(6, 5)
    assert {tuple(row) for row in told.tolist()} == answers
    assert found.peak_bytes is None and found.cpu_s > 0


def test_what_is_beyond_the_batch_waits_and_its_time_counts_from_its_arrival(server):
    found = serve(server, ask(0, 5), ask(10, 1), max_batch=1)
    least_s = FIRST_S + 4 * TOKEN_S - 0.010 + FIRST_S
    first, second = found.requests
    assert least_s <= second.metrics()["ttft_sched_s"] < least_s + 4 * LATE_S
    assert second.full[0][0] - first.end_ns >= FIRST_S * 1e9


def test_clients_of_a_closed_loop_send_when_they_have_their_answers(server):
    found = serve(server, *[ask(0, 2)] * 4, clients=2)
    sent_ns = sorted(one.sched_ns for one in found.requests)
    ends_ns = sorted(one.end_ns for one in found.requests)
    assert sent_ns[1] == sent_ns[0] and sent_ns[2] >= ends_ns[0] and sent_ns[3] >= ends_ns[1]


def test_a_request_that_breaks_costs_itself_and_says_why(server):
    asks = [ask(0, 4, fault, 0) for fault in openai_server.FAULTS]
    found = serve(server, *asks, ask(0, 4), limit_s=0.4)
    why = {one.error for one in found.requests}
    wanted = [
        'HTTP 400: {"error": {"message": "too long"}}',
        "the connection was closed within the answer",
        'the stream broke off: data: {"error": {"message": "the engine died"}}',
        UNANSWERED,
    ]
    assert len(found.requests) == 5 and found.metrics["failed"] == 4
    assert all(any((one or "").startswith(text) for one in why) for text in wanted), why
    assert found.metrics["good_share"] == pytest.approx(1 / 5)
    assert [text for text in found.invalid if text.startswith("little")] == []


def test_rewarming_asks_for_single_tokens(server):
    ids = np.array([[3], [5]])
    first = server.prefill(ids, np.ones(2, dtype=int)).argmax(-1)
    assert first.tolist() == [3, 5]
    assert server.decode(first).argmax(-1).tolist() == [6, 10], "of the prompts 3 3 and 5 5"
    with pytest.raises(StageError, match="no logits"):
        server.score(ids)


def test_a_server_that_does_not_start_says_why(tiny):
    before_s = time.perf_counter()
    with pytest.raises(StageError, match=r"with code 1; the end of .*-endpoint\.log: no GPU"):
        start(tiny(), fails="no GPU")
    assert time.perf_counter() - before_s < 5


def gone(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def soon_gone(*pids):
    end_s = time.perf_counter() + 5
    while not all(gone(pid) for pid in pids) and time.perf_counter() < end_s:
        time.sleep(0.01)
    return all(gone(pid) for pid in pids)


def test_everything_that_the_server_started_ends_with_it(tiny, monkeypatch):
    monkeypatch.setattr(endpoint, "GRACE_S", 0.2)
    opened = start(tiny(), child=True)
    child = int(opened.log.read_text().split()[1])
    assert not gone(child) and opened.cpu_ns() > time.process_time_ns()
    opened.close()
    assert soon_gone(child, opened._server.pid)


def test_it_ends_even_if_we_are_killed():
    """A process starts a server and its guard, and is then killed."""
    ours = (
        "import subprocess as s, sys\n"
        "server = s.Popen(['sleep', '600'], start_new_session=True)\n"
        "guard = s.Popen(['sh', '-c', sys.argv[1], str(server.pid), '1'], stdin=s.PIPE)\n"
        "print(server.pid, guard.pid, flush=True)\n"
        "server.wait()\n"
    )
    command = [sys.executable, "-S", "-c", ours, GUARD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        server, guard = map(int, parent.stdout.readline().split())
        os.kill(parent.pid, signal.SIGKILL)
    assert soon_gone(server, guard)


def test_vllm_gets_the_limits_of_the_offline_arm(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fake")
    device = type("Device", (), {"total_memory": 80_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(vllm, "SETTINGS", {})
    artifact = Artifact(path=tiny(), format="vllm", key="k")
    made = VllmEndpoint.__new__(VllmEndpoint)
    cache = vllm.kv_bytes(made._open(artifact))
    words = [*made.command(artifact, 8123)]
    given = dict(zip(words[3::2], words[4::2], strict=False))
    assert given["--model"] == str(tiny()) and given["--max-model-len"] == "128"
    assert given["--kv-cache-memory-bytes"] == str(cache) and given["--port"] == "8123"
    assert "--no-enable-prefix-caching" in words and "--skip-tokenizer-init" in words


def test_trtllm_serve_gets_the_cache_of_the_offline_arm(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fake")
    (tmp_path / "model").symlink_to(tiny())
    artifact = Artifact(path=tmp_path / "model", format="trtllm", key="k")
    made = TrtllmEndpoint.__new__(TrtllmEndpoint)
    made._open(artifact)
    *command, settings = made.command(artifact, 8123)
    wanted = f"trtllm-serve serve {artifact.path} --host 127.0.0.1 --port 8123 --max_seq_len 129"
    assert " ".join(command) == f"{wanted} --extra_llm_api_options"
    cache = {"max_tokens": paged.KV_TOKENS, "enable_block_reuse": False}
    assert json.loads(Path(settings).read_text()) == {"kv_cache_config": cache}


def test_an_endpoint_is_an_arm_of_its_own_where_requests_are_sent(tmp_path):
    made = [
        Arm(name=f, artifact=Artifact(path=tmp_path, format=f, key="k"), dtype="", threads=1)
        for f in BACKENDS
    ]
    single, server = Scenario(), Scenario(serving=Serving())
    assert endpoints(made, {"single": single}) == []
    found = endpoints(made, {"single": single, "server": server})
    assert [arm.name for arm in found] == [f"{format}-endpoint" for format in ENDPOINTS]
    assert [arm.find(arm.artifact.format) for arm in found] == [VllmEndpoint, TrtllmEndpoint]
