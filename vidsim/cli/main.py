"""`vidsim VERB --flags`: finds the verb, parses its flags, prints its result as one JSON line.

Exit codes: 0 done; 2 bad usage or config, a restart cannot help; 75 stopped after saving, start it
again; 130 stopped by Ctrl-C, a training after saving; 1 anything else.
"""

import difflib
import importlib
import json
import logging
import os
import pathlib
import re
import signal
import sys
import tempfile

from absl import flags
from absl import logging as absl_logging

from vidsim.cli import config_file
from vidsim.errors import InputError, Restart

VERBS = {
    "worlds": "renders a captioned world as mp4 and png files",
    "prepare": "turns a folder of videos and images into shards",
    "plan": "tables the buckets and packs of a data set",
    "train": "trains one model: tokenizer, vae, finish (its decoder) or dit",
    "encode": "writes the latent cache",
    "sample": "makes videos and images in every prompting mode",
    "evaluate": "measures a run and writes its report",
    "export": "writes weights, config and tokenizer for others",
    "run": "all stages of an experiment",
    "compile": "compiles a step for a TPU slice that need not be there: memory, time, a verdict",
}
# What Python says of a value that cannot be read -> what it is to be.
KINDS = {
    "invalid literal for int()": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "true or false",
}
BAD_INPUT, RESTART, INTERRUPTED = 2, 75, 130


def usage() -> str:
    lines = [f"  {verb:10} {does}" for verb, does in VERBS.items()]
    return "\n".join(["usage: vidsim VERB --flags", *lines, "vidsim VERB --help lists its flags"])


def fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def parse(verb: str, arguments: list[str]):
    """The verb's module, with its flags parsed.

    Raises:
      InputError: an unknown verb or flag, a config file or key that is not there, a file where
        the output is to be.
    """
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(VERBS)}"
        raise InputError(f"unknown verb {verb!r}; {remedy}")
    module = importlib.import_module(f"vidsim.cli.{verb}")
    module.define_flags()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_flag = argument.startswith("-") and before not in ("--config", "-config")
        name, equals, value = argument.partition("=") if is_flag else (before, "=", argument)
        if "=" in name or not name.startswith("-"):
            raise unexpected(argument)  # which may be why a flag is missing: said before that
        if name in ("--config", "-config") and equals:
            config = config_file.read(value)
    try:
        rest = flags.FLAGS([f"vidsim {verb}", *arguments])
    except (AttributeError, KeyError) as error:
        # It names the field alone: say which argument has it.
        words = set(re.findall(r"\w+", str(error)))
        fields = [a for a in arguments if words & set(a.partition("=")[0].split(".")[1:])]
        given = fields[0] if fields else "--config"
        meant = re.search(r'Did you mean "(\w+)"', str(error))
        name = given.partition("=")[0].removeprefix("--config.")
        beside = config_file.fields_beside(config, name)
        remedy = f"did you mean {meant[1]!r}?" if meant else beside
        raise InputError(f"{given} names no field of the experiment; {remedy}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(wrong_flag(verb, " ".join(str(error).split()))) from error
    if len(rest) > 1:
        raise unexpected(rest[1])
    for name in {"workdir", "out"} & set(flags.FLAGS):
        check_place(name, flags.FLAGS[name].value, writes=verb != "plan")
    return module


def wrong_flag(verb: str, reason: str) -> str:
    """What absl says of a flag, in words for who typed it."""
    remedy = f"`vidsim {verb} --help` lists the flags"
    if missing := re.search(r"Flag (--\w+) must have a value", reason):
        return f"{missing[1]} is missing; {remedy}"
    for words, kind in KINDS.items():
        if words in reason:
            given = reason.removeprefix("flag ").partition(": ")[0]
            if given.startswith("--config."):
                remedy = "the experiment's file shows one"
            return f"{given} is to be {kind}; {remedy}"
    return f"{reason.rstrip('.')}; {remedy}"


def unexpected(argument: str) -> InputError:
    """The error of an argument that is no flag; it names the one that was most likely meant."""
    names = ("run", "input", "workdir", "out")
    names = ("config", *names) if argument.endswith(".py") else names
    meant = next(name for name in names if name in flags.FLAGS)
    return InputError(
        f"unexpected argument {argument!r}; flags are --name=value, such as --{meant}={argument}"
    )


def check_place(name: str, value: str, *, writes: bool) -> None:
    """Finds what stands against output at the path of flag `name`; leaves nothing there.

    Raises:
      InputError: a file stands there or on the way to it, or nothing can be written there.
    """
    path = pathlib.Path(value)
    there = next(place for place in (path, *path.parents) if os.path.exists(place))
    if not os.path.isdir(there):
        raise InputError(f"--{name}={value}: {there} is a file; choose another path")
    try:
        if writes:
            tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise InputError(
            f"--{name}={value}: nothing can be written in {there} ({error.strerror}); choose "
            "another path"
        ) from error


def execute(arguments: list[str]) -> int:
    """Runs `vidsim ARGUMENTS` and returns the exit code."""
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print(usage())
        return 0 if arguments else BAD_INPUT
    verb, *rest = arguments
    try:
        if {"--help", "-h"} & set(rest) and verb in VERBS:
            module = importlib.import_module(f"vidsim.cli.{verb}")
            module.define_flags()
            defined = [n for n in flags.FLAGS.flags_by_module_dict() if n.startswith(__package__)]
            helps = [flags.FLAGS.module_help(name) for name in sorted(defined)]
            print("\n".join([f"vidsim {verb}: {module.__doc__}", *helps]))
            return 0
        module = parse(verb, rest)
        # The libraries below tell much that is not the user's business.
        absl_logging.set_verbosity(absl_logging.WARNING)
        logging.getLogger("jax").setLevel(logging.ERROR)
        from vidsim import compiling  # Here, because help needs no jax.
        from vidsim.parallel import multihost

        multihost.initialize()
        compiling.give_memory_back()
        print(json.dumps(module.main()), flush=True)
    except InputError as error:
        return fail(" ".join(str(error).split()), BAD_INPUT)
    except Restart as error:
        return fail(str(error), RESTART)
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from a second one either
        return fail(str(error) or "stopped by Ctrl-C", INTERRUPTED)
    return 0


def main() -> None:
    """The console script."""
    sys.exit(execute(sys.argv[1:]))


if __name__ == "__main__":
    main()
