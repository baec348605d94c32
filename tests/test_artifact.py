"""What decides whether an artifact is made again."""

import shutil
from pathlib import Path

from optpipe import artifact


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
