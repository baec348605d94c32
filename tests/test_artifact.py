"""What decides whether an artifact is made again."""

import shutil
from pathlib import Path

import pytest

from optpipe import artifact
from optpipe.artifact import Artifact, publish


def test_code_is_that_of_the_stages_not_of_the_benchmark(tmp_path, monkeypatch):
    package = Path(artifact.__file__).parent
    copied = shutil.copytree(package, tmp_path / "optpipe", ignore=shutil.ignore_patterns("demo"))
    monkeypatch.setattr(artifact, "__file__", str(copied / "artifact.py"))
    before = artifact.code.__wrapped__()
    assert before == artifact.code()
    (copied / "bench/clock.py").write_text("changed = True\n")
    assert artifact.code.__wrapped__() == before
    (copied / "quant/gptq.py").write_text("changed = True\n")
    assert artifact.code.__wrapped__() != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "hf"}', '{"other": 1}'])
def test_a_damaged_or_foreign_manifest_is_no_artifact_and_is_replaced(tmp_path, content):
    final = tmp_path / "made"
    final.mkdir()
    (final / "left").write_text("over")
    assert Artifact.find(final) is None
    (final / artifact.MANIFEST).write_text(content)
    assert Artifact.find(final) is None

    def make(out):
        (out / "file").write_text("whole")
        return Artifact(path=out, format="hf", key="k")

    assert publish(final, make).files == {"file": 5}
    assert Artifact.find(final).intact and not (final / "left").exists()
    (final / "file").write_text("who")
    assert Artifact.find(final) is None
