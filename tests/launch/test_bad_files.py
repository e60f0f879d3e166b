"""Files of people that cannot be read or written: each ends with one clear sentence."""

import argparse
import os
import shutil
from pathlib import Path

import pytest

from moe.batch import BatchProgress, ResultFile
from moe.config import EngineConfig
from moe.launch.cli import main
from moe.launch.place_options import with_file
from moe.launch.prompts import read_prompts
from moe.launch.serve import read_key
from moe.openai import lines_of
from tests.launch.refused import PROMPT, refused
from tests.moe.moe_cases import TINYMOE


def test_files_of_the_other_commands(capfd, tmp_path, small_model):
    text = tmp_path / "prompts.txt"
    text.write_text("A prompt\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": \n')
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes('{"custom_id": "Ċ"}\n'.encode("utf-16-le"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    trace = tmp_path / "trace.npz"
    cases = [
        (["trace", TINYMOE, tmp_path / "none.txt", trace], ["none.txt"]),
        (["trace", TINYMOE, bad, trace], ["bad.jsonl, line 2, is not valid JSON"]),
        (["trace", TINYMOE, latin, trace], ["latin.txt is not UTF-8"]),
        (["trace", TINYMOE, empty, trace], ["has no prompts"]),
        (["trace", TINYMOE, text, tmp_path / "trace.pkl"], ["must end in .npz or .safetensors"]),
        (["trace", TINYMOE, text, tmp_path / "no" / "trace.npz"], ["trace.npz"]),
        (["trace", small_model, text, trace], ["has no tokenizer; give token ids"]),
        (["batch", TINYMOE, tmp_path / "none.jsonl", tmp_path / "out.jsonl"], ["none.jsonl"]),
        (["batch", TINYMOE, bad, tmp_path / "no" / "out.jsonl"], ["out.jsonl"]),
        (["batch", TINYMOE, bad, tmp_path], [tmp_path.name]),
        (["batch", TINYMOE, bad, text], ["is no result of this program"]),
        (["pack", TINYMOE, tmp_path], ["exists already"]),
        (["batch", TINYMOE, wide, tmp_path / "out.jsonl"], ["wide.jsonl is UTF-16 or UTF-32; UTF-8 is wanted"]),
        (["trace", TINYMOE, tmp_path, trace], [f"{tmp_path} is a folder; give the name of a file"]),
        (["report", tmp_path], [f"{tmp_path} is a folder; give the name of a file"]),
        (["generate", TINYMOE, "--prompt", "a", "--config", tmp_path], [f"{tmp_path} is a folder; give the name of"]),
        (
            ["generate", TINYMOE, "--prompt", "a", "--config", tmp_path / "no.toml"],
            ["no.toml; name what is there"],
        ),
        (["info", tmp_path], ["has neither model.safetensors nor"]),
    ]
    for arguments, words in cases:
        sentence = refused(capfd, *arguments)
        assert "[Errno" not in sentence
        for word in words:
            assert word in sentence, sentence
    assert text.read_text() == "A prompt\n"
    assert not trace.exists()


def test_places_that_cannot_be_written_are_told_before_anything_runs(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write wherever the disk lets it
    places = {"batch": [TINYMOE, TINYMOE / "config.json"], "pack": [TINYMOE], "serve": [TINYMOE, "--state"]}
    for command, before in places.items():
        sentence = refused(capfd, command, *before, tmp_path / "new")
        assert "new cannot be written: permission is missing, or its disk is read-only" in sentence


def test_texts_of_other_encodings(tmp_path):
    """Whoever reads text that people write: the mark that some editors begin it with is none of it, UTF-16 is said."""
    readers = {
        "p.jsonl": (lambda p: read_prompts(p, None), '{"prompt": "é"}\r\n', ["é"]),
        "p.txt": (lambda p: read_prompts(p, None), "é\r\n", ["é"]),
        "c.toml": (lambda p: EngineConfig.load(p).max_context, "max_context = 7\n", 7),
        "place.toml": (
            lambda p: with_file(["place", "t", "--config", str(p)]),
            "seed = 3\n",
            ["place", "--seed=3", "t"],
        ),
        "key": (lambda p: read_key(argparse.Namespace(api_key_file=p, host="::1")), "secret\n", "secret"),
        "in.jsonl": (lambda p: lines_of(p.read_bytes(), str(p)), "{}\r\n", [b"{}"]),
    }
    for name, (read, text, want) in readers.items():
        path = tmp_path / name
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_bytes(text.encode(encoding))
            assert read(path) == want, (name, encoding)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            path.write_bytes(text.encode(encoding))
            with pytest.raises(ValueError, match="is UTF-16 or UTF-32; UTF-8 is wanted"):
                read(path)


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_results_are_kept_in_a_regular_file(device):
    with pytest.raises(ValueError, match="is no regular file"), ResultFile(Path(device), BatchProgress(0)):
        pass


def test_without_a_tokenizer_nothing_is_printed_before_the_error(capfd, small_model):
    assert main(["generate", str(small_model), *PROMPT]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert "has no tokenizer; give token ids" in said.err


def test_broken_tokenizer(capfd, tmp_path):
    folder = shutil.copytree(TINYMOE, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": ')
    assert "tokenizer" in refused(capfd, "generate", folder, *PROMPT)
