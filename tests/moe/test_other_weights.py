"""A host that would replace a lost one with other weights, under Ray: the folder was changed after the run began."""

import os
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

from moe.cluster.policy import ClusterError
from moe.llm import LLM
from moe.params import SamplingParams
from tests.moe.ray_session import DEMO, config_of, two_nodes, until

pytest.importorskip("ray")
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]  # Ray warns about its own code


def test_a_replacement_of_other_weights_is_refused_once_and_the_others_serve_on(tmp_path):
    folder, params = shutil.copytree(DEMO, tmp_path / "model"), SamplingParams(max_tokens=9, ignore_eos=True, seed=0)
    with two_nodes(), LLM(folder, config_of(), hosts=2) as llm:
        right = [output.outputs[0].token_ids for output in llm.generate([[5, 6], [7]], params, use_tqdm=False)]
        path, crew = folder / "model.safetensors", llm.engine.crew
        save_file({name: 1.05 * tensor for name, tensor in load_file(path).items()}, folder / "other")
        os.rename(folder / "other", path)
        os.kill(crew.alive[0].info.pid, signal.SIGKILL)
        until(llm.engine, lambda: any("did not load" in note.what for note in crew.noted))
        (told,) = {note.what for note in crew.noted if "did not load" in note.what}
        assert "holds other weights or another config.json" in told
        outputs = llm.generate([[5, 6], [7]], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == right
        assert len(crew.alive) == 1
        os.kill(crew.alive[0].info.pid, signal.SIGKILL)
        llm.engine.add_request([5], params)
        with pytest.raises(ClusterError, match=r"holds other weights .* too few hosts are left to serve"):
            until(llm.engine, lambda: False)
        assert len([note for note in crew.noted if "did not load" in note.what]) == 1
