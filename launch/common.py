"""Flags of the binaries, and errors shown as one message instead of a traceback."""

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from cir_jax.errors import CirError, ConfigError, unknown

ROOT = Path(__file__).resolve().parents[1]

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, with a preset after a colon: experiments/compodiff.py:vit_l14"
)
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; default runs/<experiment>/<preset>")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0")


def run(main: Callable[[], None]) -> None:
    """absl's app.run with readable errors: exit status 2 for what a user can mend."""
    try:
        _check_config_path(sys.argv)
        app.run(lambda _: _guarded(main), flags_parser=_parse)
    except CirError as error:
        _fail(error)


def workdir() -> Path:
    """--workdir, or the default for this config."""
    config = CONFIG.value
    return Path(WORKDIR.value or f"runs/{config.name}/{config.preset}").expanduser().absolute()


def command() -> str:
    """The command line, as it is stored with results."""
    return shlex.join(["python", *sys.argv])


def _guarded(main: Callable[[], None]) -> None:
    from cir_jax.training.loop import Preempted

    logging.getLogger().setLevel(logging.WARNING)
    if CONFIG.value is None:
        raise ConfigError("--config is missing: --config=experiments/NAME.py[:PRESET].")
    try:
        main()
    except Preempted as stop:
        print(f"{stop} Run the same command to continue.", file=sys.stderr, flush=True)
        sys.exit(143)
    except CirError as error:
        _fail(error)


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, CirError):
            raise
        # ml_collections names the closest field ("Did you mean ...")
        raise ConfigError(str(error).strip("'\"")) from error


def _check_config_path(argv: list[str]) -> None:
    values = [a.partition("=")[2] for a in argv if a.startswith(("--config=", "-config="))]
    for value in values:
        path = Path(value.partition(":")[0])
        if path.is_file():
            continue
        names = [p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "base"]
        raise ConfigError(f"{path} is no file: {unknown('experiment', path.stem, names)}")


def _fail(error: CirError) -> None:
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
