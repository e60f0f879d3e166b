"""`moe serve MODEL`: loads the model and answers HTTP until it is told to end."""

import argparse
import errno
import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path

from moe.config import EngineConfig
from moe.launch.console import err
from moe.launch.first_run import measure_first_run
from moe.launch.options import engine_config
from moe.launch.report import print_choices
from moe.llm import LLM
from moe.plain_text import read_text


def serve(args: argparse.Namespace) -> int:
    try:
        from moe.launch.live import live_state
        from moe.launch.plan_check import checked_state
        from moe.launch.recording import recording
        from moe.launch.server import Limits, make_app, make_server, serve_until_told
        from moe.launch.uploads import Uploads, only_server_of
        from moe.service import Service
    except ImportError as error:
        raise ValueError(
            f"the service needs packages that are not installed ({error}): pip install 'moeflow[serve]'"
        ) from None

    config, key = engine_config(args), read_key(args)
    if args.show_config:
        err.print(config.describe(), style="dim", markup=False)
    limits = Limits(body_bytes=args.max_body, seconds=args.max_seconds, drain_seconds=args.drain_seconds)
    check_port(args.host, args.port)
    with ExitStack() as stack:
        # Before the model: a second server by mistake must not take the hosts of the first.
        folder = args.state or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(only_server_of(folder))
        llm = stack.enter_context(loaded(args, config))
        if args.show_config and args.hosts is None:
            print_choices(llm.engine)
        for note in llm.notes:
            err.print(f"note: {note}", style="yellow", markup=False)
        if args.state is None:
            err.print("note: files and batches end with the server; --state FOLDER keeps them", style="yellow")
        service = Service(llm, args.max_open)
        uploads = Uploads(service, folder)
        app = make_app(service, uploads, limits, key)
        server = make_server(app, limits, args.host, args.port)
        err.print(f"{llm.name} is served at http://{args.host}:{args.port} (the live page, and /v1 beside it)")
        with recording(args.record, lambda: {**live_state(llm, service), **checked_state(llm.engine)}):
            serve_until_told(server)
    return 0


def check_port(host: str, port: int) -> None:
    """Raises ValueError if nothing can listen there."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            try:
                with socket.socket(family, kind, protocol) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind(address)
            except OSError as error:
                is_absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # localhost without IPv6, say
                if not is_absent or len(found) == 1:
                    raise
    except (OSError, UnicodeError) as error:
        raise ValueError(f"port {port} of {host} cannot be listened on ({error}); give another --port") from None


def loaded(args: argparse.Namespace, config: EngineConfig) -> LLM:
    """The model, here or on hosts. Raises ValueError."""
    if args.hosts is None:
        if args.address is not None:
            raise ValueError("--address is of a Ray cluster; say how many hosts shall serve, --hosts N")
        measure_first_run(args.model, config)
        return LLM(args.model, config)
    err.print(f"{args.hosts} hosts load; `moe ray status` shows them", markup=False)
    return LLM(args.model, config, hosts=args.hosts, address=args.address, controller=args.controller)


def read_key(args: argparse.Namespace) -> str | None:
    """From a file, or from the environment variable that is named. Raises ValueError if it is not there or empty."""
    key = None
    if args.api_key_file is not None:
        key = read_text(args.api_key_file).strip()
    elif args.api_key_env is not None:
        key = os.environ.get(args.api_key_env, "").strip()
    if key == "":
        raise ValueError("the API key is empty")
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        err.print(f"note: anyone who reaches {args.host}:{args.port} can use the model; --api-key-file", style="yellow")
    return key
