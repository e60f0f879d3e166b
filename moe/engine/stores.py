"""The store that a process reads its experts from, as its settings say."""

import hashlib

from moe.config import OffloadConfig
from moe.engine.share import Share
from moe.models.blueprint import Blueprint
from moe.offload.deepnvme import file_store
from moe.offload.segments import ExpertIndex
from moe.offload.shared import SharedStore
from moe.offload.short_floats import RareTable, Shortened
from moe.offload.stores import ExpertStore, MmapStore, RamStore


def open_store(offload: OffloadConfig, index: ExpertIndex) -> ExpertStore:
    """Of the files themselves."""
    if offload.store == "mmap":
        return MmapStore(index, check=offload.check)
    return file_store(index, offload.io, direct=offload.direct, check=offload.check)


def make_store(blueprint: Blueprint, offload: OffloadConfig, share: Share | None) -> ExpertStore:
    """Of what slots hold."""
    index = blueprint.index
    files = open_store(offload, index.in_files)
    if index.stored is not None:
        return Shortened(files, index.sites, index.layouts, RareTable(index.stored.expert_bytes))
    if offload.store != "ram":
        return files
    try:
        if share is None or not share.host_copy:
            return RamStore.read_from(files)
        model = hashlib.sha256(str(blueprint.folder.resolve()).encode()).hexdigest()[:16]
        return SharedStore(files, f"{share.host_copy}-{model}")
    finally:
        files.close()
