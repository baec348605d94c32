"""Runs are checked first, reuse what is there, and leave nothing half made behind."""

import json
import multiprocessing
import os
import platform
import threading
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpipe import pipeline
from optpipe.artifact import MANIFEST, Artifact, publish, sweep
from optpipe.build.ort import Ort
from optpipe.build.tensorrt import TensorRT
from optpipe.cache.static import KvCache
from optpipe.calibrate import Calib
from optpipe.errors import GateError, InputError, StageError
from optpipe.export.gguf import Gguf
from optpipe.export.onnx import Onnx
from optpipe.export.trtllm import Trtllm
from optpipe.export.trtllm_legacy import TrtllmLegacy
from optpipe.export.vllm import Vllm
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.gptq import Gptq
from optpipe.source import HuggingFace
from optpipe.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Add(Stage):
    """Writes its parent's text and one word more."""

    word: str = "a"

    def inputs(self, model):
        return f"text of {self.word}"

    def plan(self, layers):
        if self.word == "impossible":
            raise ValueError("word is impossible")
        return layers

    def run(self, source, out, progress):
        (out / "half").write_text("half")
        progress("word", 0, 1)
        if self.word == "fatal":
            os._exit(9)
        if self.word == "late":
            raise InputError("word is late")
        if self.word == "broken":
            raise KeyError("lost")
        before = source.path / "text"
        (out / "text").write_text((before.read_text() if before.is_file() else "") + self.word)
        return {"words": 1}


class ToOnnx(Add):
    produces = "onnx"


class ToOrt(Add):
    accepts = frozenset({"onnx"})
    produces = "ort"


class BackToHf(Add):
    accepts = frozenset({"onnx"})


@pytest.fixture
def source(tiny):
    return HuggingFace(path=str(tiny()))


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    """What was verified, and against what; the real thing has its own tests."""
    calls = []

    def verify(artifact, reference, planned):
        final = artifact.path.parent / f"{artifact.lineage[-1]}-{artifact.key}"
        calls.append((artifact.name, reference.name, final.exists(), len(planned)))
        return {"fine": True}

    monkeypatch.setattr("optpipe.verify.verify", verify)
    return calls


def names(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def made(stages, source, store) -> list[Artifact]:
    steps = pipeline.check(stages, source, store)
    return list(pipeline.run(steps, source.prepare(store)))


def test_each_stage_reads_what_the_one_before_wrote(source, tmp_path, verified):
    stages = {"x": Add(word="x"), "y": Add(word="y"), "e": ToOnnx(word="e"), "b": ToOrt(word="b")}
    artifacts = made(stages, source, tmp_path)
    assert [a.name for a in artifacts] == ["baseline", "x", "x+y", "x+y+e", "x+y+e+b"]
    assert [a.format for a in artifacts] == ["hf", "hf", "hf", "onnx", "ort"]
    assert (artifacts[-1].path / "text").read_text() == "xyeb"
    assert artifacts[-1].stats == {"words": 1, "verified": {"fine": True}}
    assert [a.path.name for a in artifacts[1:]] == [
        f"{name}-{a.key}" for name, a in zip("xyeb", artifacts[1:], strict=True)
    ]
    assert verified == [  # before anyone can see it, against the newest torch artifact
        ("x", "baseline", False, 22),
        ("x+y", "x", False, 22),
        ("x+y+e", "x+y", False, 22),
        ("x+y+e+b", "x+y", False, 22),
    ]


def test_a_stage_that_compares_gets_the_model_of_the_start(source, tmp_path):
    seen = []

    class Comparing(Add):
        def run_with(self, source, baseline, out, progress):
            seen.append((source.name, baseline.name, baseline.path))
            return self.run(source, out, progress)

    made({"x": Add(word="x"), "y": Comparing(word="y"), "z": Comparing(word="z")}, source, tmp_path)
    start = source.folder(tmp_path)
    assert seen == [("x", "baseline", start), ("x+y", "baseline", start)]


def test_equal_keys_are_reused_and_unequal_ones_are_not(source, tmp_path, verified):
    first = made({"x": Add(word="x"), "y": Add(word="y")}, source, tmp_path)
    again = made({"x": Add(word="x"), "y": Add(word="y")}, source, tmp_path)
    assert again == first and len(verified) == 2
    other = made({"x": Add(word="z"), "y": Add(word="y")}, source, tmp_path)
    assert len({a.key for a in (*first[1:], *other[1:])}) == 4
    assert first[0].key == other[0].key


def test_the_key_depends_on_everything_that_decides_the_result(source, tiny, tmp_path, monkeypatch):
    def key(stage=None, model=source):
        return pipeline.check({"s": stage or Add()}, model, tmp_path)[0].key

    keys = [
        key(),
        key(Add(word="b")),
        key(ToOnnx()),
        key(model=HuggingFace(path=str(tiny("gpt2")))),
    ]
    monkeypatch.setattr(Add, "inputs", lambda self, model: "another text")
    keys.append(key())
    monkeypatch.setattr(pipeline, "code", lambda: "changed")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_the_lineage_is_that_of_this_run(source, tmp_path):
    (_, first, _) = made({"x": Add(), "y": Add(word="y")}, source, tmp_path)
    (_, other, last) = made({"z": Add(), "y": Add(word="y")}, source, tmp_path)
    assert first.key == other.key
    assert last.lineage == ("z", "y")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"e": ToOnnx(), "x": Add()}, "stage 'x' accepts hf, but gets onnx from stage 'e'; "
                                      "a possible order: stages=[x,e]"),
        ({"b": ToOrt()}, "stage 'b' accepts onnx, but gets hf from the model; no order"),
        ({"x": Add(word="impossible")}, "stage 'x': word is impossible"),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_are_refused(source, tmp_path, stages, message):
    with pytest.raises(InputError) as caught:
        pipeline.check(stages, source, tmp_path)
    assert str(caught.value).startswith(message)


CALIB = Calib(source="random", samples=4, tokens=32)
CACHE = {number: KvCache(number=number, calib=CALIB) for number in ("int8", "fp8")}


@pytest.mark.parametrize("stages, message", [
    ([CACHE["int8"], Onnx(), TensorRT()], "caches of floats only"),
    ([CACHE["fp8"], Onnx()], "KV cache in fp8 cannot be verified as ONNX"),
    ([CACHE["int8"], Vllm()], "vLLM has a KV cache in fp8, none in int8"),
    ([CACHE["int8"], Trtllm()], "TensorRT-LLM has a KV cache in fp8, none in int8"),
    ([CACHE["fp8"], TrtllmLegacy()], "no scales of a KV cache"),
    ([CACHE["fp8"], Gguf()], "leave the cache stage out"),
    ([Onnx(capacity=64), TensorRT(max_prompt=65)], r"max_prompt 65 exceeds export\.capacity 64"),
    ([Onnx(dtype="bfloat16"), TensorRT(target="sm75")], r"bfloat16 begins with sm80, not sm75"),
    ([Onnx(), TensorRT(max_prompt=129)], r"max_prompt 129 exceeds export\.capacity 128"),
    ([Onnx(dtype="bfloat16"), Ort()], "multiplies no bfloat16"),
])  # fmt: skip
def test_what_a_stage_cannot_follow_is_refused_before_any_work(stages, message, source, tmp_path):
    """What neither formats nor layers tell: the type of the KV cache, of floats, its capacity."""
    named = {f"s{index}": stage for index, stage in enumerate(stages)}
    with pytest.raises(InputError, match=message):
        pipeline.check(named, source, tmp_path)
    assert not any(tmp_path.iterdir())


@given(st.lists(st.sampled_from([Add, ToOnnx, ToOrt, BackToHf]), min_size=1, max_size=5))
def test_the_order_advised_fits_whenever_one_does(classes):
    stages = {f"{index}": cls() for index, cls in enumerate(classes)}

    def fits(order) -> bool:
        made = "hf"
        for stage in order:
            if made not in stage.accepts:
                return False
            made = stage.produces
        return True

    order = pipeline._order(stages, "hf")
    if order is None:
        assert not any(map(fits, permutations(stages.values())))
    else:
        assert sorted(order) == sorted(stages) and fits(stages[name] for name in order)


@pytest.mark.parametrize(
    ("word", "error"), [("broken", StageError), ("late", StageError), ("fine", GateError)]
)
def test_a_failure_leaves_nothing_behind(source, tmp_path, monkeypatch, word, error):
    def refuse(artifact, reference, planned):
        raise GateError("no")

    if error is GateError:
        monkeypatch.setattr("optpipe.verify.verify", refuse)
    with pytest.raises(error) as caught:
        made({"x": Add(word=word)}, source, tmp_path)
    assert names(tmp_path) == []
    if error is StageError:
        cause = "KeyError: 'lost'" if word == "broken" else "word is late"
        assert str(caught.value) == f"stage 'x' failed: {cause}"
        assert isinstance(caught.value.__cause__, KeyError | InputError)


def _die(path: str, store: str) -> None:
    made({"x": Add(word="x"), "y": Add(word="fatal")}, HuggingFace(path=path), Path(store))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_killed_run_resumes(source, tmp_path, verified):
    child = multiprocessing.get_context("fork").Process(
        target=_die, args=(source.path, str(tmp_path))
    )
    child.start()
    child.join(60)
    assert child.exitcode == 9
    done, half = (
        [n for n in names(tmp_path) if n[0] != "."],
        [n for n in names(tmp_path) if n[0] == "."],
    )
    assert len(done) == 1 and done[0].startswith("x-") and len(half) == 1
    sweep(tmp_path)
    assert names(tmp_path) == done
    artifacts = made({"x": Add(word="x"), "y": Add(word="y")}, source, tmp_path)
    assert [call[0] for call in verified] == ["x+y"]  # x was not made again
    assert (artifacts[-1].path / "text").read_text() == "xy"


def test_only_folders_of_dead_processes_are_swept(tmp_path):
    here, dead = platform.node(), 2**22 + 1  # above the largest process number of Linux
    keep = [f".x-1.{here}.{os.getpid()}.abc", f".x-1.elsewhere.{dead}.abc", "x-1", ".cache"]
    for name in (*keep, f".x-1.{here}.{dead}.abc"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == sorted(keep)


def test_runs_that_make_the_same_artifact_at_once_all_get_it(tmp_path):
    together = threading.Barrier(6)

    def make(out: Path) -> Artifact:
        (out / "text").write_text("same")
        together.wait(10)
        return Artifact(path=out, format="hf", key="k")

    found: list[Artifact] = []
    threads = [
        threading.Thread(target=lambda: found.append(publish(tmp_path / "x-k", make)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 6 and {a.path for a in found} == {tmp_path / "x-k"}
    assert names(tmp_path) == ["x-k"]
    assert sorted(path.name for path in (tmp_path / "x-k").iterdir()) == [MANIFEST, "text"]
    assert json.loads((tmp_path / "x-k" / MANIFEST).read_text())["key"] == "k"


def test_space_is_needed_only_for_what_is_not_there_yet(source, tmp_path, monkeypatch):
    stages = {"x": Add(word="x"), "y": Add(word="y")}
    monkeypatch.setattr(Add, "output_bits", lambda *_: 8_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3_900_000))
    with pytest.raises(InputError, match=r"has 3\.9 MB free, but this run may write 4\.0 MB"):
        pipeline.check_space(pipeline.check(stages, source, tmp_path), source, tmp_path)
    made({"x": Add(word="x")}, source, tmp_path)
    pipeline.check_space(pipeline.check(stages, source, tmp_path), source, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_900_000))
    with pytest.raises(InputError):
        pipeline.check_space(pipeline.check(stages, source, tmp_path), source, tmp_path)


def test_a_folder_is_tried_by_writing(tmp_path):
    pipeline.check_writable(tmp_path / "a" / "b", "store")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/store"), Path("/proc")):
        with pytest.raises(InputError, match="cannot write to store"):
            pipeline.check_writable(bad, "store")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_space_asked_for_is_what_is_written_and_a_little_more(name, tiny, tmp_path):
    """Both ways: too small an estimate breaks a run halfway, too large a one refuses a good one."""
    calib = Calib(source="random", samples=2, tokens=32)
    stages = {
        "prune": Magnitude(targets=["*mlp*"]),
        "quant": Gptq(bits=4, group_size=32, symmetric=False, calib=calib),
        "export": Onnx(),
        "build": Ort(),
    }
    source = HuggingFace(path=str(tiny(name)))
    steps = pipeline.check(stages, source, tmp_path)
    for step, artifact in zip(
        steps, [*pipeline.run(steps, source.prepare(tmp_path))][1:], strict=True
    ):
        weights = sum(f.stat().st_size for f in artifact.path.iterdir()
                      if f.suffix in (".safetensors", ".data"))  # fmt: skip
        estimate = step.size_bytes - pipeline.SIDE_BYTES
        padding = 4096 * 40  # graphs align every weight to a page, much for a model this small
        assert weights - padding < estimate < 1.6 * weights, step.name


def test_a_damaged_artifact_is_made_again(source, tmp_path):
    first = made({"x": Add(word="x")}, source, tmp_path)[-1]
    file = next(f for f in first.path.iterdir() if f.name in first.files)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    again = made({"x": Add(word="x")}, source, tmp_path)[-1]
    assert again.path == first.path and file.read_bytes() == whole
