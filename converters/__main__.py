"""`python -m converters inspect|verify|export`."""

import argparse
import io
import os
import shutil
import signal
import sys
import warnings
from typing import NoReturn

from vfjax import InputError
from vfjax.atomic import UNFINISHED


def main() -> int:
    """Runs one verb; 0 if all is well, 1 if a comparison failed, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m converters", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    look = verbs.add_parser("inspect", help="say what a checkpoint folder is (headers only)")
    look.add_argument("path")
    made = verbs.add_parser(
        "export",
        help="write a model's folder in another layout, with code, to the hub",
        description="Writes a model in another layout, block by block: the new folder answers as "
        "the old one, and what its layout cannot say is refused. Without --layout it is loaded, "
        "and written as it came.",
        epilog="examples:\n"
        "  python -m converters export llava-v1.5-7b llava-v1.5-7b-hf --layout=hf\n"
        "  python -m converters export llava-v1.6-vicuna-7b out --layout=hf \\\n"
        "      --towers openai/clip-vit-large-patch14-336=clip\n"
        "  python -m converters export llava-onevision-hf llava-onevision --layout=llava\n"
        "  python -m converters export fused fused-with-code --remote_code --push_to_hub=me/fused",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("path", help="the model's folder")
    made.add_argument("out", help="folder to make")
    made.add_argument(
        "--layout",
        choices=("hf", "llava"),
        help="hf: transformers'; llava: that of LLaVA's authors",
    )
    made.add_argument(
        "--remote_code",
        action="store_true",
        help="add code, so that transformers runs a fused folder without vfjax (needs torch)",
    )
    made.add_argument(
        "--push_to_hub", metavar="ORG/NAME", help="send the new folder there, with a model card"
    )
    made.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether others may not see what is made there; else as the account has it",
    )
    for verb in (look, made):
        verb.add_argument("--base", help="folder of the model that an adapter or projector is for")
        verb.add_argument(
            "--towers",
            nargs="+",
            type=_pair,
            default=[],
            metavar="NAME=FOLDER",
            help="where they are",
        )
    same = verbs.add_parser("verify", help="compare with recorded outputs of other code")
    same.add_argument("case", nargs="+")
    args = parser.parse_args()
    try:
        if args.verb == "inspect":
            from converters.inspect import inspect

            print(inspect(args.path, towers=dict(args.towers), base=args.base), flush=True)
            return 0
        if args.verb == "export":
            from converters.export import export

            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", UserWarning)
                towers = dict(args.towers)
                export(
                    args.path,
                    args.out,
                    layout=args.layout,
                    towers=towers,
                    base=args.base,
                    remote_code=args.remote_code,
                    push_to_hub=args.push_to_hub,
                    private=args.private,
                )
            for note in notes:
                if issubclass(note.category, UserWarning):
                    print(f"note: {note.message}", file=sys.stderr)
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
