"""`python -m converters inspect|fuse|export|verify`."""

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
    joined = _fuse_parser(verbs)
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
    for verb in (joined, made):
        verb.add_argument(
            "--remote_code",
            action="store_true",
            help="add code, so that transformers runs a fused folder without vfjax (needs torch)",
        )
        verb.add_argument(
            "--push_to_hub", metavar="ORG/NAME", help="send the new folder there, with a model card"
        )
        verb.add_argument(
            "--private",
            action=argparse.BooleanOptionalAction,
            help="whether others may not see what is made there; else as the account has it",
        )
    for verb in (look, made):
        verb.add_argument("--base", help="folder of the model that an adapter or projector is for")
    for verb in (look, joined, made):
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
    args, rest = parser.parse_known_args()
    if args.verb == "fuse":  # OUT stands behind options
        args.paths += [path for path in rest if not path.startswith("-")]
        rest = [path for path in rest if path.startswith("-")]
        if not args.paths:
            joined.error("found no folders, expected MEMBER... OUT")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.verb == "inspect":
            from converters.inspect import inspect

            print(inspect(args.path, towers=dict(args.towers), base=args.base), flush=True)
            return 0
        if args.verb == "fuse":
            return _fuse(args)
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


def _fuse_parser(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """What `fuse` takes; the other arguments of `converters.fuse` are in Python and in its task."""
    parser = verbs.add_parser(
        "fuse",
        help="fuse multimodal LLMs of one base LLM into one, without training",
        description="Fuses members that were fine-tuned from one base LLM: their LLMs are merged, "
        "each keeps its eyes, and the visual tokens of all are read. A folder may be org/name "
        "on the Hugging Face hub.",
        epilog="examples:\n"
        "  python -m converters fuse llava-a llava-b --base vicuna-7b-v1.5 fused\n"
        "  python -m converters fuse llava-a llava-b --base vicuna-7b-v1.5 fused --dry_run\n"
        "  python -m converters fuse a=me/llava-a b=me/llava-b --base lmsys/vicuna-7b-v1.5 \\\n"
        "      --vocab=base --positions=parallel --mask=block fused\n"
        "  python -m converters fuse a b --base c --method=ties --weights=0.7,0.3 \\\n"
        "      --param=density=0.5 fused\n"
        "  python -m converters fuse --recipe=mergekit.yml --export=llm merged",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="*", metavar="[NAME=]MEMBER", help="folders; the last one, OUT, is made"
    )
    parser.add_argument("--base", help="the LLM that all members were fine-tuned from")
    parser.add_argument("--method", help="default: task_arithmetic; see docs/merging.md")
    parser.add_argument(
        "--weights", type=_weights, metavar="W,W", help="one a member; default: 1 / members"
    )
    parser.add_argument(
        "--param",
        action="append",
        type=_param,
        default=[],
        metavar="NAME=VALUE",
        help="another parameter of the method",
    )
    parser.add_argument("--recipe", help="a mergekit YAML file, in place of members and method")
    parser.add_argument(
        "--vocab", metavar="base|NAME", help="whose added tokens are kept, where members differ"
    )
    parser.add_argument("--positions", choices=("running", "parallel"), default="running")
    parser.add_argument("--mask", choices=("causal", "block"), default="causal")
    parser.add_argument("--export", choices=("model", "llm", "whole"), default="model")
    parser.add_argument("--template", help="prompt template; default: the first member's")
    parser.add_argument("--dry_run", action="store_true", help="say what would be written")
    parser.add_argument("--resume", action="store_true", help="go on with a killed run")
    return parser


def _fuse(args: argparse.Namespace) -> int:
    """Runs `fuse`, or says what it would do."""
    import json

    from converters.files.hub import by_names
    from converters.fuse import dry_run, fuse

    *given, out = args.paths
    members = by_names(given, "fuse")
    params = dict(args.param) | ({"weights": args.weights} if args.weights else {})
    options = {
        key: value
        for key in ("base", "method", "recipe", "vocab", "template")
        if (value := getattr(args, key)) is not None
    }
    options |= {"positions": args.positions, "mask": args.mask, "export": args.export}
    options |= {"towers": dict(args.towers)} | ({"params": params} if params else {})
    if args.dry_run:
        print(json.dumps(dry_run(members, out, **options), indent=2))
        return 0
    fuse(
        members,
        out,
        resume=args.resume,
        remote_code=args.remote_code,
        push_to_hub=args.push_to_hub,
        private=args.private,
        **options,
    )
    print(f"{out}/MERGE.md says what was merged; python -m converters inspect {out}")
    return 0


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers, as 0.6,0.4") from None


def _param(text: str) -> tuple[str, object]:
    import json

    name, given, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        if not given or not value:
            raise argparse.ArgumentTypeError(f"{text}: found no =, expected NAME=VALUE") from None
        return name, value


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
