"""Phase `decode` of the GPU session: what lies around the experts in a decoding step, right and timed.

Attention over blocks and over latents, kernels between a layer's products, an expert cache's routing and copies.
Limits: the cache's bytes over the memory's rate; a launch; the host's link.
"""

from typing import Any

import torch

from bench.gpu_run import Session
from moe.kernels.block_kernels import Turn, add_norm, add_norm_reference, turned, turned_reference
from moe.kernels.latent_attention import latent_attention, latent_attention_reference
from moe.kernels.paged_attention import Pages, Scores, paged_attention, paged_attention_reference
from moe.kernels.slot_lookup import gather
from moe.offload.cache import ExpertCache
from moe.offload.copies import SlotCopies
from moe.offload.device_cache import DeviceCache
from moe.offload.formats.slot import MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.stores import RamStore, aligned_bytes

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def decode(s: Session) -> None:
    for num, length in ((2, 5),) if s.tiny else ((1, 1024), (16, 1024), (64, 1024), (1, 32768)):
        for name, of in (("paged", _paged), ("latents", _latents)):
            with s.rows.attempt(what=name, sequences=num, keys=length):
                of(s, num, length)
    for num in (2,) if s.tiny else (1, 16, 64):
        with s.rows.attempt(what="between products", sequences=num):
            _between(s, num)
    with s.rows.attempt(what="device cache"):
        _cache(s)


def _judged(s: Session, found: Any, wanted: Any) -> float:
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= BOUNDS[s.dtype]:
        raise ValueError(f"WRONG: {error:.2e} from the twin")
    return error


def _pages(s: Session, num: int, length: int) -> Pages:
    blocks = -(-length // 16)
    tables = torch.randperm(num * blocks, device=s.device).to(torch.int32).view(num, blocks)
    return Pages(tables, torch.full((num,), length, dtype=torch.int32, device=s.device), 16, length)


def _random(s: Session, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=s.device).to(s.dtype)


def _paged(s: Session, num: int, length: int) -> None:
    heads, kv_heads, dim = (4, 2, 16) if s.tiny else (32, 4, 128)
    pages = _pages(s, num, length)
    pool = [_random(s, pages.tables.numel() * 16, kv_heads, dim) for _ in range(2)]
    q, new = _random(s, num, heads, dim), (_random(s, num, kv_heads, dim), _random(s, num, kv_heads, dim))
    scores = Scores(dim**-0.5)
    wanted = paged_attention_reference(q, new, (pool[0], pool[1]), pages, scores)
    error = _judged(s, paged_attention(q, new, (pool[0], pool[1]), pages, scores), wanted)
    us = s.clock.median_us(lambda: paged_attention(q, new, (pool[0], pool[1]), pages, scores), s.repeats)
    nbytes = 2 * num * length * kv_heads * dim * s.dtype.itemsize
    s.rows.add(what="paged", sequences=num, keys=length, us=us, gb_per_s=nbytes / us / 1e3, error=error)


def _latents(s: Session, num: int, length: int) -> None:
    heads, sizes = (4, (16, 8)) if s.tiny else (128, (512, 64))
    pages = _pages(s, num, length)
    a, b = (_random(s, pages.tables.numel() * 16, 1, n) for n in sizes)
    q, new = ((_random(s, *of, sizes[0]), _random(s, *of, sizes[1])) for of in ((num, heads), (num,)))
    scale = sum(sizes) ** -0.5
    wanted = latent_attention_reference(q, new, (a, b), pages, scale)
    error = _judged(s, latent_attention(q, new, (a, b), pages, scale), wanted)
    us = s.clock.median_us(lambda: latent_attention(q, new, (a, b), pages, scale), s.repeats)
    nbytes = num * length * sum(sizes) * s.dtype.itemsize
    s.rows.add(what="latents", sequences=num, keys=length, us=us, gb_per_s=nbytes / us / 1e3, error=error)


def _between(s: Session, num: int) -> None:
    hidden, heads, kv_heads, dim = (24, 4, 2, 8) if s.tiny else (2048, 32, 4, 128)
    weight, h, add = _random(s, hidden), _random(s, num, hidden), _random(s, num, hidden)
    head = _random(s, dim)
    turn = Turn(heads, kv_heads, dim, dim, head, head, 1e-6)
    q, k, cos, sin = (_random(s, num, n) for n in (heads * dim, kv_heads * dim, dim, dim))
    for name, ours, theirs in (
        (
            "norm",
            lambda: add_norm(h.clone(), add, weight, 1e-6),
            lambda: add_norm_reference(h.clone(), add, weight, 1e-6),
        ),
        ("turn", lambda: turned(q, k, cos, sin, turn)[0], lambda: turned_reference(q, k, cos, sin, turn)[0]),
    ):
        error = _judged(s, ours(), theirs())
        both = {kind: s.clock.median_us(run, s.repeats) for kind, run in (("us", ours), ("torch_us", theirs))}
        s.rows.add(what=name, sequences=num, error=error, **both)


def _cache(s: Session) -> None:
    """Half of the experts of four layers in slots: what a visit costs, and at which rate its misses come."""
    hidden, inter, experts, layers = (12, 7, 8, 2) if s.tiny else (2048, 768, 128, 4)
    sites = [
        ExpertSite(module=str(n), num_experts=experts, hidden_size=hidden, intermediate_size=inter, has_bias=False)
        for n in range(layers)
    ]
    layouts = [ExpertLayout.of(site, MatrixFormat(s.dtype)) for site in sites]
    store = RamStore(layouts, [aligned_bytes(experts * one.nbytes).view(experts, -1) for one in layouts])
    for number, blobs in enumerate(store.blobs):
        blobs.view(torch.int32).copy_(torch.arange(experts)[:, None] + 1000 * number)
    cache = ExpertCache(store, experts * layers // 2, num_readers=0, device=s.device)
    try:
        assert s.device.type == "cpu" or isinstance(cache._filling, SlotCopies)
        device = cache.lend()
        if not isinstance(device, DeviceCache):
            raise ValueError("the device does not take the cache")
        for misses, tokens in ((8, 1), (64, 16)) if not s.tiny else ((2, 1),):
            _visits(s, cache, device, tokens, min(misses, experts))
        cache.unpin()
        cache.check()
    finally:
        cache.close()


def _visits(s: Session, cache: ExpertCache, device: DeviceCache, tokens: int, most: int) -> None:
    experts, nbytes = cache.num_experts[0], cache.blob_bytes
    ids = [torch.rand(tokens, experts, device=s.device).topk(min(8, experts // 2)).indices for _ in range(8)]
    right, before = True, [s.misses for s in cache.stats]
    for number in range(2 if s.tiny else 32):
        layer = number % len(cache.num_experts)
        slots = device.look_up(layer, ids[number % 8])
        first = cache.slab.of_layer(layer)[slots.flatten().long(), :4].contiguous().view(torch.int32).flatten()
        right &= bool((first == ids[number % 8].flatten() + 1000 * layer).all())
    misses = sum(one.misses for one in cache.stats) - sum(before)
    calls = iter(range(1 << 30))
    us = s.clock.median_us(lambda: device.look_up(next(calls) % 4 % len(cache.num_experts), ids[0]), s.repeats)
    device._scratch.num_copies.fill_(most)
    device._scratch.copies[0, :most] = torch.arange(most)
    device._scratch.copies[1, :most] = torch.arange(most)
    copy_us = s.clock.median_us(
        lambda: gather(device._scratch, most, device._sources, cache.slab.of_layer(0), nbytes), s.repeats
    )
    rates = {"gather_us": copy_us, "gather_gb_per_s": most * nbytes / copy_us / 1e3}
    s.rows.add(what="device cache", tokens=tokens, misses=misses, right=right, visit_us=us, copied=most, **rates)
    if not right:
        raise ValueError("WRONG: a slot does not hold the expert that it is said to")
