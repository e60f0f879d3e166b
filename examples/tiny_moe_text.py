"""A folder of texts, one file or folder per domain, as a tokenizer and batches of token ids."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_moe_model import SEPARATOR
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

PLAIN_SUFFIXES = (".txt", ".md", ".py")
HELD_OUT = 0.05  # the last part of every domain


class Encoded(NamedTuple):
    """One domain's token ids, both [tokens]."""

    train: Tensor
    held_out: Tensor


def read_domains(folder: Path) -> dict[str, str]:
    """Domain name → its documents joined by the separator, from every file or folder directly inside `folder`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with a file or a folder of texts per domain")
    domains: dict[str, str] = {}
    for entry in sorted(folder.iterdir()):
        files = sorted(p for p in entry.rglob("*") if p.is_file()) if entry.is_dir() else [entry]
        documents = [document for file in files for document in read_documents(file)]
        if documents:
            if entry.stem in domains:
                raise ValueError(f"two entries of {folder} give the domain {entry.stem!r}; rename one")
            domains[entry.stem] = "".join(document + SEPARATOR for document in documents)
    if not domains:
        raise ValueError(f"{folder} holds no {', '.join(PLAIN_SUFFIXES)} or .jsonl file with text")
    return domains


def read_documents(file: Path) -> list[str]:
    """The documents of one file; none where its suffix is not a known one."""
    if file.suffix in PLAIN_SUFFIXES:
        text = file.read_text(encoding="utf-8")
        return [text] if text.strip() else []
    if file.suffix != ".jsonl":
        return []
    documents = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error.msg}); repair or remove it") from error
        strings = [v for v in item.values() if isinstance(v, str)] if isinstance(item, dict) else []
        documents.append(item["text"] if strings and "text" in item else "\n".join(strings))
    return [d for d in documents if d.strip()]


def train_tokenizer(domains: dict[str, str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the training parts, at most 2 MB of each domain; token 0 is the separator."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (split(text)[0][:2_000_000].split(SEPARATOR) for text in domains.values())
    tokenizer.train_from_iterator((document for part in parts for document in part), trainer)
    return tokenizer


def split(text: str) -> tuple[str, str]:
    """The training part and the held-out part."""
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def encode(domains: dict[str, str], tokenizer: Tokenizer, length: int) -> dict[str, Encoded]:
    """Every domain's token ids; ValueError where a part is shorter than one sequence."""
    data = {}
    for name, text in domains.items():
        encoded = Encoded(*(torch.tensor(tokenizer.encode(part).ids) for part in split(text)))
        if min(len(encoded.train), len(encoded.held_out)) <= length:
            raise ValueError(
                f"domain {name!r} has {len(encoded.train)} training and {len(encoded.held_out)} held-out tokens; each "
                f"must be more than sequence_length ({length}): add text or lower it"
            )
        data[name] = encoded
    return data


def draw_batch(data: dict[str, Encoded], number: int, *, size: int, length: int, seed: int) -> Tensor:
    """Batch `number` of a run: [size, length + 1], the domains in turn, windows drawn from (seed, number) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    parts = [encoded.train for encoded in data.values()]
    rows = []
    for row in range(number * size, (number + 1) * size):
        ids = parts[row % len(parts)]
        start = int(torch.randint(len(ids) - length, (), generator=generator))
        rows.append(ids[start : start + length + 1])
    return torch.stack(rows)
