"""`python -m converters inspect|verify`."""

import argparse
import io
import os
import shutil
import signal
import sys
from typing import NoReturn

from vfjax import InputError
from vfjax.atomic import UNFINISHED


def main() -> int:
    """Runs one verb; 0 if all is well, 1 if a comparison failed, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m converters", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    look = verbs.add_parser("inspect", help="say what a checkpoint folder is (headers only)")
    look.add_argument("path")
    look.add_argument("--base", help="folder of the model that an adapter or projector is for")
    look.add_argument(
        "--towers", nargs="+", type=_pair, default=[], metavar="NAME=FOLDER", help="where they are"
    )
    same = verbs.add_parser("verify", help="compare with recorded outputs of other code")
    same.add_argument("case", nargs="+")
    args = parser.parse_args()
    try:
        if args.verb == "inspect":
            from converters.inspect import inspect

            print(inspect(args.path, towers=dict(args.towers), base=args.base), flush=True)
            return 0
        from converters.verify import run

        return 0 if run(args.case) else 1
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `| head`, which has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def end(number: int, _: object) -> NoReturn:
    """The handler of signals that end: removes temporary folders, ends with the shell's code.

    An exception would be lost in a destructor, such as those of JAX.
    """
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.strsignal(number)}"
    print(what, file=sys.stderr)
    for path in tuple(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
    os._exit(128 + number)


def _pair(text: str) -> tuple[str, str]:
    name, given, folder = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"{text}: found no =, expected NAME=FOLDER")
    return name, folder


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:  # as by nohup
            signal.signal(each, end)
    sys.exit(main())
