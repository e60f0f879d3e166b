"""`moe import-trace`: files as vLLM, SGLang and ESFT leave them; what is none of them is one sentence."""

import numpy as np
import pytest
import torch

from moe.launch.cli import main
from moe.placement.trace import RoutingTrace


def routing(tokens, layers=3, experts=8, top_k=2):
    return np.random.default_rng(tokens).random((tokens, layers, experts)).argsort(-1)[..., :top_k].astype(np.int16)


def run(tmp_path, *arguments):
    return main(["import-trace", *map(str, arguments), "--out", str(tmp_path / "trace.npz")])


def test_vllm(tmp_path, capsys):
    one, two = routing(5), routing(4)
    np.save(tmp_path / "one.npy", one)
    np.savez(tmp_path / "more.npz", a=two, b=one)
    files = [tmp_path / "one.npy", tmp_path / "more.npz"]
    assert run(tmp_path, *files, "--from", "vllm", "--experts", 8, "--model", "m") == 0
    assert "14 tokens of 3 sequences, 3 layers of 8 experts, top-2" in capsys.readouterr().out
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([one, two, one]))
    assert trace.model == "m"


def test_sglang(tmp_path):
    ids = torch.from_numpy(routing(6).astype(np.int32)).transpose(0, 1).contiguous()
    torch.save({"records": [{"topk_ids_of_layer": ids, "extend_seq_lens": [2, 4]}]}, tmp_path / "records.pt")
    assert run(tmp_path, tmp_path / "records.pt", "--from", "sglang", "--experts", 8) == 0
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.sequence_lengths.tolist() == [2, 4]
    np.testing.assert_array_equal(trace.expert_ids, ids.transpose(0, 1).numpy())


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_what_is_wrong_is_one_sentence_and_no_code_runs(tmp_path, capfd):
    (tmp_path / "no.npy").write_bytes(b"nothing")
    for name in ("empty.npy", "empty.npz", "empty.pt"):
        (tmp_path / name).touch()
    np.savez(tmp_path / "whole.npz", a=routing(50))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:400])
    np.save((tmp_path / "array.npy"), routing(5))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    (tmp_path / "folder.npy").mkdir()
    torch.save([1], tmp_path / "list.pt")
    torch.save({"records": [Evil()]}, tmp_path / "evil.pt")
    wrong = [
        (["no.npy", "--from", "vllm"], "give --experts"),
        (["no.npy", "--from", "vllm", "--experts", 8], "no.npy is no .npy file"),
        (["empty.npy", "--from", "vllm", "--experts", 8], "empty.npy is no .npy file"),
        (["empty.npz", "--from", "vllm", "--experts", 8], "empty.npz cannot be read as a plain .npz file"),
        (["cut.npz", "--from", "vllm", "--experts", 8], "cut.npz cannot be read as a plain .npz file"),
        (["array.npz", "--from", "vllm", "--experts", 8], "array.npz cannot be read as a plain .npz file"),
        (["objects.npz", "--from", "vllm", "--experts", 8], "objects.npz cannot be read as a plain .npz file"),
        (["whole.npz", "--from", "sglang", "--experts", 8], "whole.npz is no .pt file"),
        (["empty.pt", "--from", "sglang", "--experts", 8], "empty.pt is no .pt file"),
        (["list.pt", "--from", "sglang", "--experts", 8], "hold no records"),
        (["folder.npy", "--from", "vllm", "--experts", 8], "folder.npy is a folder; give the name of a file"),
        (["evil.pt", "--from", "esft"], "evil.pt"),
        (["evil.pt", "--from", "sglang", "--experts", 8], "evil.pt is no .pt file"),
        (["no.npy", "--from", "esft"], "no.npy"),
    ]
    for (name, *rest), sentence in wrong:
        assert run(tmp_path, tmp_path / name, *rest) == 2
        out, err = capfd.readouterr()
        assert sentence in err
        assert "Traceback" not in err
        assert "[Errno" not in err
        assert "pickle" not in err
        assert "weights_only" not in err
        assert "code ran" not in out


@pytest.mark.heavy
def test_esft(tmp_path, shared_data):
    file = shared_data / "traces" / "deepseek_v2_lite_intent.npz"
    assert run(tmp_path, file, "--from", "esft") == 0
    assert RoutingTrace.load(tmp_path / "trace.npz").num_tokens == 8222
