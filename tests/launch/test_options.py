"""What a command line takes, of every command alike: numbers have ranges, files are there or can be written."""

import argparse
import dataclasses
import os
import re
from pathlib import Path

import pytest

from moe.launch import probe as links
from moe.launch import ray_cluster, torchrun
from moe.launch.cli import _parser, main
from moe.launch.options import check_inputs, check_outputs, named_path
from moe.params import SamplingParams
from tests.moe.moe_cases import TINYMOE


def written_files():
    """Every option and argument of a command that names a file to write, by its help."""
    found = []
    for name, parser in _parser()._subparsers._group_actions[0].choices.items():
        for action in parser._actions:
            says = f"{action.help} {action.dest}"
            if action.type is named_path and name != "pack" and re.search(r"\bwrit|\bout(put)?\b|append|^\.npz", says):
                found.append((name, action.dest))
    return found


def every_argument(parser: argparse.ArgumentParser, name: str):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, own in action.choices.items():
                yield from every_argument(own, f"{name} {command}")
        elif action.help != argparse.SUPPRESS:
            yield f"{name} {action.dest}", action


def test_help_says_what_everything_is_and_its_default():
    parsers = (_parser(), torchrun.parser(), ray_cluster.make_parser())
    for name, action in (found for parser in parsers for found in every_argument(parser, parser.prog)):
        assert action.help, name
        is_said = any(text in action.help for text in (str(action.default), "default %(default)s"))
        assert action.default in (None, False, [], 0.0, "", argparse.SUPPRESS) or is_said, name


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(capfd, tmp_path):
    found = written_files()
    assert {name for name, _ in found} >= {"batch", "serve", "trace", "report", "analyze", "place", "fit-lookahead"}
    (tmp_path / "folder").mkdir()
    for command, dest in found:
        for path, words in ((tmp_path / "no" / "x", "there is no folder"), (tmp_path / "folder", "is a folder")):
            with pytest.raises(ValueError, match=words):
                check_outputs(argparse.Namespace(command=command, **{dest: path}))
    assert main(["fit-lookahead", str(TINYMOE), "none.txt", "-o", str(tmp_path / "no" / "x.safetensors")]) == 2
    assert "there is no folder" in capfd.readouterr().err


def test_no_command_writes_over_what_it_reads_or_over_a_model(tmp_path):
    reads = {(command, dest): is_many for command, dest, is_many in [*read_files(), *read_later()]}
    pairs = 0
    for command, written in written_files():
        there = tmp_path / "there"
        there.write_text("mine")
        for (other, dest), is_many in reads.items():
            if other == command and dest != written and dest not in ("present", "against"):
                args = argparse.Namespace(command=command, **{dest: [there] if is_many else there, written: there})
                with pytest.raises(ValueError, match="is read by this command"):
                    check_outputs(args)
                pairs += 1
        for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "packed.json"):
            (tmp_path / "model").mkdir(exist_ok=True)
            for file in ("config.json", name):
                (tmp_path / "model" / file).write_text("{}")
            with pytest.raises(ValueError, match="is a file of the model in"):
                check_outputs(argparse.Namespace(command=command, **{written: tmp_path / "model" / name}))
    assert pairs > 20, pairs


def test_no_command_writes_over_a_file_that_is_there_unless_it_is_told_to(capfd, tmp_path):
    """Of every command alike; only what `moe batch` answers is added to. A device is no file that would be lost."""
    (there := tmp_path / "run.html").write_text("mine")
    for command, dest in written_files():
        args = argparse.Namespace(command=command, **{dest: there}, overwrite=False)
        if dest != "output":
            with pytest.raises(ValueError, match=r"run.html is there already; give .*, or --overwrite"):
                check_outputs(args)
            parser = _parser()._subparsers._group_actions[0].choices[command]
            assert any(action.dest == "overwrite" for action in parser._actions), command
            check_outputs(argparse.Namespace(command=command, **{dest: Path("/dev/null")}, overwrite=False))
            args.overwrite = True
        check_outputs(args)
    (tmp_path / "run.jsonl").write_text('{"time": 1, "tokens": 0, "heat": []}\n')
    assert main(["report", str(tmp_path / "run.jsonl")]) == 2  # the name that it would choose itself
    assert "run.html is there already" in capfd.readouterr().err
    assert there.read_text() == "mine"


def test_no_command_writes_two_files_to_one_name(tmp_path):
    for command, one, other in (("place", "out", "html"), ("simulate", "html", "png"), ("batch", "output", "record")):
        args = argparse.Namespace(command=command, **dict.fromkeys((one, other), tmp_path / "x"), overwrite=True)
        with pytest.raises(ValueError, match="x is named for two files to be written"):
            check_outputs(args)


def read_later():
    """Files and folders of a command that are named by an argument, and that their readers look for."""
    written = set(written_files())
    for name, parser in _parser()._subparsers._group_actions[0].choices.items():
        for action in parser._actions:
            is_read = action.type is named_path and action.dest in ("model", "trace", "plan", "config")
            if (is_read or action.dest == "topology") and (name, action.dest) not in written:
                yield name, action.dest, False


def test_a_path_that_is_empty_is_not_the_present_folder(capsys):
    """Of every command: `Path("")` is "."."""
    for name, parser in _parser()._subparsers._group_actions[0].choices.items():
        for action in parser._actions:
            assert action.type is not Path, (name, action.dest)
    for arguments in (["info", ""], ["batch", str(TINYMOE), "", "out"], ["place", "a", "--out", ""]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "it is empty; name a file or a folder" in capsys.readouterr().err


def all_parsers(parser):
    """Of a command line, and of the commands within it."""
    yield parser
    for action in parser._actions:
        for inner in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from all_parsers(inner)


def numbers():
    """(command, option, its type) of everything that is a number on a command line."""
    for parser in [p for top in (_parser(), torchrun.parser(), ray_cluster.make_parser()) for p in all_parsers(top)]:
        for action in parser._actions:
            told = isinstance(action.default, (int, float)) and not isinstance(action.default, bool)
            of_range = getattr(action.type, "__module__", "") == named_path.__module__ and action.type is not named_path
            if told or of_range or action.type in (int, float):
                yield parser.prog, action.dest, action.type


def test_a_dash_is_no_file_of_that_name(capsys):
    for words in (["batch", "m", "in.jsonl", "-"], ["batch", "m", "-", "out.jsonl"], ["trace", "m", "p.jsonl", "-"]):
        with pytest.raises(SystemExit):
            _parser().parse_args(words)
        assert "pipes are not read or written; name a file" in capsys.readouterr().err
    assert str(_parser().parse_args(["batch", "m", "in.jsonl", "./-"]).output) == "-"


def test_every_number_of_a_command_line_has_a_range():
    """Those of a request are checked where requests of all ways are."""
    of_requests = {field.name for field in dataclasses.fields(SamplingParams)}
    found = list(numbers())
    assert len(found) > 30
    for command, dest, kind in found:
        if dest in of_requests and kind in (int, float):
            continue
        assert kind not in (int, float, None), (command, dest)
        for text in ("nan", "-1", "x", "", "1e300", "-inf"):
            with pytest.raises(argparse.ArgumentTypeError, match=r"must (be >=|lie in)|is no (whole )?number"):
                kind(text)


def test_a_number_out_of_range_names_its_option(capsys):
    for words, said in (
        (["plan", "model", "--ranks", "0"], "--ranks: 0 must lie in [1, 4096]"),
        (["place", "trace.npz", "--out", "p.json", "--seconds", "nan"], "--seconds: nan must be >= 0"),
        (["serve", "model", "--port", "70000"], "--port: 70000 must lie in [0, 65535]"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err


def read_files():
    """Every option and argument of a command that names a file to read, but a model's folder."""
    written = set(written_files())
    for name, parser in _parser()._subparsers._group_actions[0].choices.items():
        for action in parser._actions:
            own = {"state", "config", "model", "trace", "plan", "folder", "out"}  # made, or said by what reads them
            if action.type is named_path and (name, action.dest) not in written and action.dest not in own:
                yield name, action.dest, action.nargs is not None


def test_a_file_that_is_not_there_is_said_before_anything_is_computed(tmp_path):
    found = list(read_files())
    assert {name for name, *_ in found} >= {"batch", "serve", "report", "analyze", "place", "evaluate", "pack"}
    for command, dest, is_many in found:
        path = tmp_path / "nothing"
        with pytest.raises(ValueError, match="there is no"):
            check_inputs(argparse.Namespace(command=command, **{dest: [path] if is_many else path}))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe can be read only once, and a batch is read again"):
        check_inputs(argparse.Namespace(command="batch", input=tmp_path / "pipe"))


def test_figures_that_could_not_be_kept_are_not_measured(tmp_path, monkeypatch, capsys):
    """Of commands that make the folders that they write in."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr("moe.launch.measure.probe", fail)
    monkeypatch.setattr("moe.launch.probe.probe", fail)
    (tmp_path / "file").touch()
    for words, said in (
        (["probe", str(tmp_path), "--file", str(tmp_path / "file" / "x" / "machine.json")], "file is no folder"),
        (["probe", str(tmp_path), "--file", str(tmp_path)], "is a folder; give the name of a file"),
        (["pack", str(TINYMOE), str(tmp_path / "file" / "x")], "file is no folder"),
        (["serve", str(TINYMOE), "--state", str(tmp_path / "file")], "file is no folder"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert links.main([str(tmp_path / "no" / "links.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setattr("os.access", lambda path, how: path != tmp_path)  # what root never sees
    for words in (["probe", str(tmp_path), "--file", str(tmp_path / "x" / "y")], ["pack", "m", str(tmp_path / "p")]):
        assert main(words) == 2
        assert "permission is missing, or its disk is read-only" in capsys.readouterr().err
