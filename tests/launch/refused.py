"""What a command says that refuses: one clear sentence on standard error and exit status 2."""

from moe.launch.cli import main

PROMPT = ["--prompt", "Once upon a time", "--max-tokens", "2"]


def refused(capfd, *arguments) -> str:
    """The sentence; everything before it is the settings, everything else a traceback, which must not be."""
    status = main([str(a) for a in arguments])
    captured = capfd.readouterr()
    assert status == 2, captured
    assert "Traceback" not in captured.err
    sentences = [line for line in captured.err.splitlines() if line.startswith(f"moe {arguments[0]}: ")]
    assert len(sentences) == 1, captured.err
    return sentences[0]
