"""Which reads bring the segments of an expert: side by side in a file what lies so, straight to its place what may."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moe.offload.layout import ALIGNMENT
from moe.offload.segments import ExpertIndex, Segment


class Run(NamedTuple):
    """Segments that lie side by side in one file."""

    path: Path
    offset: int
    nbytes: int
    segments: tuple[Segment, ...]


def runs_of(segments: Sequence[Segment]) -> list[Run]:
    runs: list[Run] = []
    for segment in sorted(segments):
        last = runs[-1] if runs else None
        if last is not None and (last.path, last.offset + last.nbytes) == (segment.path, segment.offset):
            runs[-1] = Run(last.path, last.offset, last.nbytes + segment.nbytes, (*last.segments, segment))
        else:
            runs.append(Run(segment.path, segment.offset, segment.nbytes, (segment,)))
    return runs


class ReadsOfExpert(NamedTuple):
    """What brings one expert: how many reads, and the bytes that are copied because no read can put them in place."""

    number: int
    copied_bytes: int


def reads_of(index: ExpertIndex, *, direct: bool) -> ReadsOfExpert:
    """Of the first expert, by `FileStore`."""
    runs = runs_of(index.segments(0, 0))
    made = [info for conversion in index.conversions(0, 0) for info in conversion.tensors]
    block = ALIGNMENT if direct else 1
    straight = sum(each.nbytes for run in runs for each in stretches_of(run, 0, block) if each.target is not None)
    moved = sum(run.nbytes for run in runs) - straight + sum(info.nbytes for info in made)
    return ReadsOfExpert(max(1, len(runs) + len(made)), moved)


class Stretch(NamedTuple):
    """Bytes of a file that are read to one place of the blob, or to a buffer (None) and copied from there."""

    begin: int
    nbytes: int
    target: int | None


def stretches_of(run: Run, blob_at: int, block: int) -> list[Stretch]:
    """What of the run, and of the blocks around it, goes where: side by side in the file.

    blob_at: the blob's address; block: what offsets in the file and addresses must be multiples of.
    """
    found = list[Stretch]()
    at, last = run.offset // block * block, -(-(run.offset + run.nbytes) // block) * block
    for offset, nbytes, target in ((s.offset, s.nbytes, s.blob_offset) for s in run.segments if s.size is None):
        begin, end = -(-offset // block) * block, (offset + nbytes) // block * block
        if begin < end and not (blob_at + target - offset) % block:
            found += [Stretch(at, begin - at, None)] if at < begin else []
            found.append(Stretch(begin, end - begin, target + begin - offset))
            at = end
    return found + ([Stretch(at, last - at, None)] if at < last else [])


def in_parts(targets: Sequence[memoryview], most: int) -> Iterator[list[memoryview]]:
    """The same memory in the same order, in parts of `most` bytes; the last has what is left."""
    part, room = list[memoryview](), most
    for memory in targets:
        while len(memory) >= room:
            yield [*part, memory[:room]]
            memory, part, room = memory[room:], [], most
        if len(memory):
            part.append(memory)
            room -= len(memory)
    if part:
        yield part
