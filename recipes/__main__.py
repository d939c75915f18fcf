"""The command line: `python -m recipes COMMAND`, or `lightning-mixers COMMAND`. Help and version load neither torch nor Lightning."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module

from mixers.errors import ConfigError, unknown

COMMANDS: dict[str, tuple[str, str]] = {  # name: (module and function, what it does)
    "fit": ("fit:run", "train a model"),
    "validate": ("evaluate:validate", "loss of a checkpoint on the validation set"),
    "test": ("evaluate:test", "loss of a checkpoint on the test set"),
    "predict": ("evaluate:predict", "a checkpoint's output for the test set"),
    "generate": ("generate:run", "continue a text with a checkpoint"),
    "mixers": ("mixers:run", "list mixers, their settings and the size of their state"),
    "preflight": ("preflight:run", "check a config: sizes, memory, optimizer groups; needs no GPU and no data"),
    "prepare": ("prepare:run", "tokenize a corpus once, into shards for data.path"),
    "consolidate": ("consolidate:run", "one checkpoint file from a sharded one"),
    "diff": ("diff:run", "why two runs differ, by their receipts"),
    "match": ("match:run", "the MLP width that gives a config so many parameters in its blocks"),
    "doctor": ("doctor:run", "what the ops run on here, proof that the kernels are right, what to mend"),
    "bench": ("bench:run", "times of the ops, a layer and decoding, beside other implementations"),
}

EXAMPLE = "recipes fit --config quickstart --model.lm.layout '[kda, swa]'"


def usage() -> str:
    """The text of `--help`."""
    lines = [f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items()]
    options = "  --help, --version, and COMMAND --help"
    return "\n".join(["usage: python -m recipes COMMAND ...", "", *lines, "", options, f"  example: python -m {EXAMPLE}"])


def version() -> str:
    """The installed version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("lightning-mixers")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "not installed"


def find_command(name: str) -> Callable[[list[str]], int]:
    """The function behind a subcommand."""
    if name not in COMMANDS:
        raise unknown("command", "command", name, COMMANDS)
    module, _, function = COMMANDS[name][0].partition(":")
    run: Callable[[list[str]], int] = getattr(import_module(f"recipes.commands.{module}"), function)
    return run


def _not_begun(signum: int, _: object) -> None:
    if os.environ.get("LIGHTNING_MIXERS_PARENT") == str(os.getppid()):  # as `lit_modules.stopping` has it: the first process says it
        os.kill(os.getppid(), signum)
        time.sleep(2)
        os._exit(143)
    os.write(2, f"stopped by {signal.Signals(signum).name} before training began: nothing was written, the same command line begins again\n".encode())
    os._exit(143)


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """Around the imports of a training, which take seconds: SIGTERM and SIGUSR1 end it as `lit_modules.stopping`, which is among them, does later."""
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    main_thread = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, _not_begun) for signum in signals if main_thread}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def lost_process(error: RuntimeError) -> str | None:
    """The line for an error that means that another process of a training has ended; None for another."""
    if "lit_modules.parallel" not in sys.modules:  # which a training has loaded
        return None
    from lit_modules import parallel

    return parallel.lost_process(error)


def interrupted() -> int:
    """Says so; the exit code of a command that Ctrl-C has stopped."""
    print("interrupted", file=sys.stderr)
    return 130


def lost_output(text: str = "") -> OSError | None:
    """Why standard output does not take what was written and this text; None where it does. Then it goes nowhere: Python would complain at exit."""
    try:
        if sys.stdout is not None:  # None: the shell has closed it
            sys.stdout.write(text)
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def main(argv: list[str] | None = None) -> int:
    """Runs a command line (without the program's name) and returns its exit code: 2 for what the user can mend, said in one line."""
    try:
        code = run_command(sys.argv[1:] if argv is None else argv)
        lost = lost_output()
    except OSError as error:
        lost = lost_output("\n")  # python -u keeps nothing that could fail again
        if lost is None and not isinstance(error, BrokenPipeError):  # it was something else
            raise
        code, lost = 1, lost or error
    if lost is None:
        return code
    if not isinstance(lost, BrokenPipeError):  # who read the output has had enough (head, less)
        print(f"error: standard output cannot be written: {lost.strerror or lost}", file=sys.stderr)
    return code or 1


def run_command(arguments: list[str]) -> int:
    """`main` without its word on an output that cannot be written."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"lightning-mixers {version()}")
        return 0
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # a mixer beside the config is found by its dotted path, as `python -m` would
    try:
        with ends_on_signals() if arguments[0] == "fit" else nullcontext():
            command = find_command(arguments[0])
        return command(arguments[1:])
    except ConfigError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except FloatingPointError as error:  # the training has diverged
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except RuntimeError as error:
        line = lost_process(error)
        if line is None:
            raise
        print("error:", line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted()
    except SystemExit as stop:  # --help and --print_config of a subcommand
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's, after Ctrl-C
            return interrupted()
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(main())
