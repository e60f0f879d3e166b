"""`moe probe`: measures this machine, keeps the figures, shows them."""

import argparse
from collections.abc import Iterator

from rich.table import Table

from moe.config import EngineConfig
from moe.engine.known import this_machine
from moe.launch.console import out, say_who_measures
from moe.launch.options import check_made
from moe.offload.budget import format_bytes
from moe.placement.machine import Machine, load_machine, measures_alone, save_machine


def run(args: argparse.Namespace) -> int:
    """Measures and stores, or shows what is stored with --show."""
    file = EngineConfig(probe_file=args.file or None).probe_path
    if args.show:
        if (known := load_machine(file, this_machine())) is None:
            raise ValueError(f"{file} knows nothing of this machine ({this_machine()}); run `moe probe`")
    else:
        if not args.folder.is_dir():
            raise ValueError(f"{args.folder} is no folder; give one on the disk that models are read from")
        if file.is_dir():
            raise ValueError(f"{file} is a folder; give the name of a file with --file")
        check_made(file.parent)
        from moe.launch.measure import probe  # loads the engine's parts, which `--show` needs none of

        with measures_alone(file, say_who_measures):
            known = probe(args.folder, load_machine(file, this_machine()))
            save_machine(file, known)
    out.print(known.name, markup=False)
    for table in tables(known):
        out.print(table)
    out.print(f"{file}, {known.when}", markup=False)
    return 0


def tables(machine: Machine) -> Iterator[Table]:
    """All figures, for people."""
    table = Table(title="weights read and multiplied, ns for each 1000, by rows", title_justify="left", box=None)
    rows = sorted({r.rows for r in machine.rates})
    for name in ("", "threads", *map(str, rows)):
        table.add_column(name, justify="right")
    for work, kind, threads in dict.fromkeys((r.work, r.format, r.threads) for r in machine.rates):
        own = {r.rows: r for r in machine.rates if (r.work, r.format, r.threads) == (work, kind, threads)}
        figures = (f"{own[n].seconds * 1e12:.0f}" if n in own else "" for n in rows)
        table.add_row(f"{work} {kind}", str(threads), *figures)
    yield table
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for count, rate in machine.memory.items():
        table.add_row(f"memory, {count} thread(s)", f"{format_bytes(rate)}/s")
    if (attention := machine.attention) is not None:
        table.add_row("keys and values", f"{format_bytes(attention.kv_bytes_per_s)}/s")
        table.add_row("attention of a prompt", f"{attention.prompt_macs_per_s / 1e9:.1f} G multiplications/s")
    if (over := machine.overhead) is not None:
        table.add_row("a step, and each sequence", f"{over.step * 1e6:.0f} + {over.step_sequence * 1e6:.0f} µs")
        table.add_row("a layer, and each sequence", f"{over.layer * 1e6:.0f} + {over.layer_sequence * 1e6:.1f} µs")
        table.add_row("called by itself", f"{over.apart * 1e6:.0f} + {over.apart_sequence * 1e6:.1f} µs")
        table.add_row("a layer with misses, and each", f"{over.miss * 1e6:.0f} + {over.wave * 1e6:.0f} µs")
    yield table
    for disk, reads in machine.disks.items():
        table = Table(title=f"random reads, {disk}, MiB/s", title_justify="left", box=None)
        sizes = sorted({r.nbytes for r in reads})
        for heading in ("", "at a time", *(format_bytes(n) for n in sizes)):
            table.add_column(heading, justify="right")
        for how, depth in dict.fromkeys((r.how, r.depth) for r in reads):
            by_size = {r.nbytes: r.bytes_per_s for r in reads if (r.how, r.depth) == (how, depth)}
            table.add_row(how, str(depth), *(f"{by_size[n] / (1 << 20):.0f}" if n in by_size else "" for n in sizes))
        yield table
