"""What `moe fit-lookahead` and `moe evaluate` take."""

import argparse

from moe.launch.options import add_engine_options, add_overwrite_option, named_path, real, whole


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fit = subparsers.add_parser("fit-lookahead", help="learn from texts what routes the layers ahead will take")
    add_engine_options(fit)
    fit.add_argument("texts", type=named_path, nargs="+", help="text files, all of them like what will be served")
    fit.add_argument("-o", "--out", type=named_path, required=True, help="file to write (.safetensors)")
    add_overwrite_option(fit)
    fit.add_argument("--distances", type=whole(1), default=3, help="how many layers ahead (default 3)")
    fit.add_argument("--ridge", type=real(1e-9), default=10.0, help="weight of the penalty (default %(default)s)")
    fit.add_argument(
        "--steps", type=whole(0), default=0, help="of distilling the gates on from there, e.g. 300 (default 0)"
    )
    _add_window_options(fit)
    fit.set_defaults(run="predict:fit")

    evaluate = subparsers.add_parser("evaluate", help="loss, agreement and KL of a run beside the exact one")
    add_engine_options(evaluate)
    evaluate.add_argument("texts", type=named_path, nargs="+", help="text files that nothing was fitted to")
    evaluate.add_argument(
        "--against", type=named_path, metavar="MODEL", help="what the model was rounded from, as the exact run"
    )
    _add_window_options(evaluate)
    evaluate.set_defaults(run="predict:evaluate")


def _add_window_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", type=whole(16), default=256, help="tokens of one sequence (default 256)")
    parser.add_argument("--limit", type=whole(1), help="windows to use, in turn from every file (default: all)")
