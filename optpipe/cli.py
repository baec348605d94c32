"""``python -m optpipe recipe=NAME [group=option] [key=value]``"""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optpipe import config
from optpipe.artifact import sweep
from optpipe.errors import GateError, InputError, StageError, TimingError, one_line

if TYPE_CHECKING:
    from optpipe.evaluate import EvalConfig

log = logging.getLogger(__name__)
USAGE = """\
python -m optpipe [recipe=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]

Makes a model smaller and faster stage by stage, then measures every artifact against the baseline.
The last line of standard output is the folder of the report, after -m that of all jobs together.

{overview}

stages          a list, such as 'stages=[quant,export,build]'
store           folder of the artifacts, shared by all runs

  --cfg job     show every key and its value, and stop
  -m            before the first KEY=A,B: one run for each combination of values

A run that was killed goes on when the same command is given again: from the last finished artifact,
and in the benchmark from the last block, as long as the machine was not booted in between.
Your own recipes go into ./recipes/NAME.yaml.
Exit codes: 0 success, 2 bad input, 3 an artifact is wrong or not good enough, 4 a stage broke,
5 a timing is no measurement (a verdict is INVALID; everything else of the report holds).
"""
OK, BAD_INPUT, BAD_RESULT, BROKEN, BAD_TIMING, INTERRUPTED = 0, 2, 3, 4, 5, 130
"""Exit codes."""


def main() -> int:
    """Run what the command line asks for; the exit code, of several jobs (-m) the worst."""
    codes: list[int] = []
    swept: list[tuple[HydraConf, int]] = []

    def job(cfg: DictConfig) -> None:
        codes.append(_guarded(cfg))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            swept.append((HydraConfig.get(), codes[-1]))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself and exits with 1
    conf = str(config.data_dir("conf"))
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):  # Hydra's own help takes seconds
            print(USAGE.format(overview=config.overview()))
            return OK
        _check_options(sys.argv[1:])
        config.register_recipes(config.data_dir("recipes"), Path("recipes"))
        hydra.main(version_base="1.3", config_path=conf, config_name="config")(job)()
    except InputError as error:
        return _complain(str(error), BAD_INPUT)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        return _complain(config.explain(error), BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on from here", INTERRUPTED)
    return max([*codes, _merge(swept)])


def _merge(swept: list[tuple[HydraConf, int]]) -> int:
    """One report of all jobs of a sweep, in its folder; an exit code."""
    if not swept:
        return OK
    from optpipe.bench.pages.merge import Job, merge

    out = Path(swept[0][0].sweep.dir).absolute()
    jobs = [
        Job(folder=Path(conf.runtime.output_dir), overrides=tuple(conf.overrides.task), code=code)
        for conf, code in swept
    ]
    try:
        if merge(jobs, out):
            print(f"report: {out}", flush=True)
    except (ValueError, OSError) as error:
        return _complain(f"the sweep has no report of its own: {one_line(error)}", BROKEN)
    return OK


def _guarded(cfg: DictConfig) -> int:
    """One job; its exit code. Whatever goes wrong is one line on stderr, the rest is in the log."""
    out = Path(HydraConfig.get().runtime.output_dir)
    try:
        _work(cfg, out)
    except InputError as error:
        code = _complain(str(error), BAD_INPUT, error)
    except GateError as error:
        code = _complain(str(error), BAD_RESULT, error)
    except TimingError as error:
        code = _complain(str(error), BAD_TIMING, error)
    except Exception as error:  # noqa: BLE001  the boundary: no traceback on the screen
        what = str(error) if isinstance(error, StageError) else repr(error)
        code = _complain(f"{what}; see {_log_file(out)}", BROKEN, error)
    else:
        code = OK
    if (out / "report.json").is_file():
        print(f"report: {out}", flush=True)
    return code


def _work(cfg: DictConfig, out: Path) -> None:
    """Check everything, make every artifact, measure them."""
    from optpipe import pipeline  # what these import takes seconds, too long for --help
    from optpipe.bench import run as bench
    from optpipe.bench.fidelity import quality
    from optpipe.bench.scenario import Scenario, read_texts
    from optpipe.bench.scenario import check as check_scenarios
    from optpipe.bench.timed.measure import BenchConfig
    from optpipe.source import Source
    from optpipe.stage import Limits

    with _inputs():
        config.check_choices(HydraConfig.get().runtime.choices)
        if not isinstance(cfg.store, str) or not cfg.store:
            raise InputError(f"store must be a folder, got {cfg.store!r}")
        store = Path(cfg.store)
        stages = config.build_stages(cfg)
        source: Source = config.build(cfg.model, Source, "model")
        policy: BenchConfig = config.typed(cfg.bench, BenchConfig, "bench")
        scenarios = config.build_scenarios(cfg, Scenario)
        tasks = _tasks(cfg)
        OmegaConf.save(cfg, out / "config.yaml", resolve=True)
        steps = pipeline.check(stages, source, store)
        decoder = source.checkpoint.decoder
        check_scenarios(scenarios, steps[-1].limits if steps else Limits(tokens=decoder.context))
        folder = source.checkpoint.path
        read_texts(scenarios, folder)
        quality.windows(folder, policy.quality, decoder.context, decoder.vocab, policy.seed)
        pipeline.check_writable(store, "store")
        pipeline.check_space(steps, source, store)
    for override in config.unused(cfg, HydraConfig.get().overrides.task):
        log.warning("%s has no effect: the stages are %s", override, list(cfg.stages))
    sweep(store)
    with pipeline.failing_as("model"):
        baseline = source.prepare(store)
    artifacts = list(pipeline.run(steps, baseline))
    with pipeline.failing_as("bench"):
        bench.run(artifacts, policy, scenarios, out, _context(cfg), tasks)


def _tasks(cfg: DictConfig) -> EvalConfig | None:
    """What to evaluate, if anything; raises InputError unless it is there."""
    if "eval" not in cfg:
        return None
    from optpipe.evaluate import EvalConfig, task_manager

    found: EvalConfig = config.typed(cfg.eval, EvalConfig, "eval")
    task_manager(found)
    return found


@contextmanager
def _inputs() -> Iterator[None]:
    """Before any work, an error is about what the user gave us."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise InputError(config.explain(error)) from error
    except OSError as error:
        raise InputError(one_line(error)) from error


def _context(cfg: DictConfig) -> dict[str, object]:
    """What the report says about how the run was started."""
    hydra_cfg = HydraConfig.get()
    return {
        "command": ["python", "-m", "optpipe", *sys.argv[1:]],
        "overrides": list(hydra_cfg.overrides.task),
        "recipe": hydra_cfg.runtime.choices["recipe"],
        "stages": list(cfg.stages),
    }


def _check_options(argv: list[str]) -> None:
    """Raise InputError for an option that Hydra would answer with a page on how to use it."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        _, unknown = parser.parse_known_args(argv)
    except ArgumentError as error:
        raise InputError(str(error)) from error
    if unknown and unknown[0].startswith("-"):
        raise InputError(
            f"unknown option '{unknown[0]}'; recipes and values are given as key=value"
        )
    if unknown:
        raise InputError(f"'{unknown[0]}': options such as -m come before every key=value")


def _complain(message: str, code: int, error: Exception | None = None) -> int:
    if error is not None:
        log.error(message, exc_info=error)  # to the log file only
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _log_file(out: Path) -> Path:
    return out / f"{HydraConfig.get().job.name}.log"
