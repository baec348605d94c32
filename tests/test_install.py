"""conf/ and recipes/ are found from a checkout, an editable install and a wheel, anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
CODE = """
import site, sys
place, *arguments = sys.argv[1:]
sys.path[:] = [p for p in sys.path if "optpipe" not in p]  # an install of ours must not help
site.addsitedir(place)  # reads .pth files, which an editable install consists of
sys.path.insert(0, place)
from optpipe import cli, config
print(config.data_dir("conf"))
sys.argv = ["optpipe", *arguments]
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def installs(tmp_path_factory):
    """kind -> (folder to import from, where conf/ must be found)."""
    places = {"checkout": (ROOT, ROOT / "conf")}
    for kind, version in (("wheel", "standard"), ("editable", "editable")):
        folder = tmp_path_factory.mktemp(kind)
        (file,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=[version])
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder / "site")
        places[kind] = (folder / "site", ROOT / "conf")
    wheel = places["wheel"][0]
    places["wheel"] = (wheel, wheel / "optpipe" / "conf")
    return places


def run(place: Path, folder: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", CODE, str(place), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["checkout", "editable", "wheel"])
def test_configs_are_found_from_anywhere(installs, kind, tmp_path):
    place, conf = installs[kind]
    printed = run(place, tmp_path, "recipe=int4_ort", "--cfg", "job")
    assert printed[0] == str(conf)
    assert "  _target_: optpipe.quant.gptq.Gptq" in printed and "- quant" in printed
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("stages: [prune]\nstore: here\n")
    assert "store: here" in run(place, tmp_path, "recipe=mine", "--cfg", "job")


def test_the_wheel_holds_the_demo_and_nothing_stray(installs):
    site, _ = installs["wheel"]
    demo = {path.name for path in (site / "optpipe" / "demo").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "heldout.txt"} <= demo
    assert (site / "optpipe" / "conf" / "model" / "shapes" / "llama_160m.yaml").is_file()
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"optpipe"}
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 30e6
