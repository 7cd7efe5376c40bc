"""Flags of the binaries, and errors shown as one message instead of a traceback."""

import difflib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from cir_jax.errors import CirError, ConfigError, unknown
from cir_jax.storage import buckets, places
from launch import ending, huge_pages

ROOT = Path(__file__).resolve().parents[1]
CONFIG_FLAGS = ("--config", "-config")

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, with a preset after a colon: experiments/compodiff.py:vit_l14; or "
    "ORG/NAME or the directory of a shared composer"
)  # fmt: skip
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory, also gs://BUCKET/...; default runs/<experiment>/<preset>"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0")


def run(main: Callable[[], None], needs_config: Callable[[], bool] = lambda: True) -> None:
    """absl's app.run with readable errors: exit status 2 for what a user can mend.

    needs_config: whether --config must be given, asked when the flags are known. Signals end it as
    `ending.run` says.
    """
    # it prints its warnings itself, and absl's root logger would, too
    logging.getLogger("huggingface_hub").propagate = False
    huge_pages.apply()
    ending.run(lambda: _run(main, needs_config))


def _run(main: Callable[[], None], needs_config: Callable[[], bool]) -> None:
    try:
        _check_config_path(sys.argv)
        app.run(lambda _: _guarded(main, needs_config()), flags_parser=_parse)
    except CirError as error:
        raise ending.Failed(str(error)) from error


def workdir() -> Path:
    """--workdir, or the default for this config."""
    config = CONFIG.value
    return buckets.place(WORKDIR.value or f"runs/{config.name}/{config.preset}")


def command() -> list[str]:
    """The command line, as it is stored with results."""
    return ["python", *sys.argv]


def join(joining: ModuleType) -> None:
    """Joins the other processes as the flags or the environment say; before any use of JAX."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # $JAX_COMPILATION_CACHE_DIR
        # a resumed run, and an evaluation after training, need not compile again
        jax.config.update("jax_compilation_cache_dir", str(places.default_compiled_dir()))
    joining.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)


def prepare(config: ConfigDict, training: bool) -> None:
    """Builds what the config reads and this project can make itself (the embedded world)."""
    from cir_jax import experiment as experiments
    from cir_jax import weights
    from cir_jax.evaluation import benchmarks, selection
    from cir_jax.training import stages
    from data import build

    needs = [benchmarks.required(config.evaluation.benchmarks)]
    if training:
        needs += [stages.required_tables(config), selection.required(config)]
    # a wrong name or size shows before minutes of work
    weights.load_architecture(config.backbone, image_size=config.get("image_size"))
    data_dir = experiments.data_dir(config)
    ending.phase("preparing data", f"finished shards in {data_dir} are kept")
    build.prepare_needed(*needs, data_dir=data_dir)
    ending.phase("loading weights and data", f"prepared data in {data_dir} are kept")


def evaluating(output: Path) -> None:
    """The phase of an evaluation whose results go to `output`."""
    from cir_jax.storage.places import default_cache_dir

    ending.phase(
        "evaluating",
        f"image features are kept in {default_cache_dir()}, {output}/results.json comes last",
    )


def _guarded(main: Callable[[], None], needs_config: bool) -> None:
    from cir_jax.training.loop import Preempted

    absl_logging.set_verbosity(absl_logging.WARNING)
    if needs_config and CONFIG.value is None:
        raise ConfigError("--config is missing: --config=experiments/NAME.py[:PRESET].")
    try:
        main()
        if ending.several():  # until all have come so far, what one finds wrong ends all
            from cir_jax.sharding import together

            together.meet("the end")
    except Preempted as stop:
        print(f"{stop} Run the same command to continue.", file=sys.stderr, flush=True)
        sys.exit(128 + stop.signal)
    except CirError as error:
        raise ending.Failed(str(error)) from error


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(_with_shared(argv))
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        for cause in _chain(error):
            if isinstance(cause, CirError):
                # of a config file: ml_collections puts the traceback into the message
                last = str(cause).strip().splitlines()[-1]
                raise ConfigError(last.partition("Error: ")[2] or last) from None
        # absl and ml_collections name the closest flag or field ("Did you mean ...")
        message = str(error.args[0] if error.args else error)
        for escaped, plain in (("\\n", " "), ("\\'", "'")):
            message = message.replace(escaped, plain)
        message = message.strip("\"' ")
        if not isinstance(error, flags.Error):
            name, _, hint = message.partition("'")
            message = f"no such config field, or not of its type: '{name}'.{hint}"
        raise ConfigError(message) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def _with_shared(argv: list[str]) -> list[str]:
    """A shared composer in the place of --config's file, as the file that makes a config of it."""
    changed = list(argv)
    for i, value in _configs(argv):
        if _is_shared(value):
            flag = argv[i].removesuffix(value)  # "--config=", or "" after --config
            changed[i] = f"{flag}{ROOT / 'launch' / 'shared.py'}:{value}"
    return changed


def _is_shared(value: str) -> bool:
    """Whether --config names a shared composer: its directory, or the form of a hub id."""
    path = Path(value).expanduser()
    if path.suffix == ".py":
        return False
    ours = difflib.get_close_matches(path.parent.name, ["experiments"], cutoff=0.8)
    return path.is_dir() or (places.is_hub_id(value) and not ours)


def _configs(argv: list[str]) -> list[tuple[int, str]]:
    """The values of --config, and which words they are in."""
    found = []
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in CONFIG_FLAGS and equals:
            found.append((i, value))
        elif flag in CONFIG_FLAGS and i + 1 < len(argv):
            found.append((i + 1, argv[i + 1]))
    return found


def _check_config_path(argv: list[str]) -> None:
    for _, value in _configs(argv):
        path = Path(value.partition(":")[0])
        if path.is_file() or _is_shared(value):
            continue
        names = [p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem != "base"]
        if path.stem in names:
            raise ConfigError(f"{path} is no file. Give {ROOT / 'experiments' / path.stem}.py.")
        raise ConfigError(f"{path} is no file: {unknown('experiment', path.stem, names)}")
