"""What an `LLM` opens: a model in this process, or on the hosts of a Ray cluster. Imports torch and transformers."""

from pathlib import Path
from typing import Any, NamedTuple, cast

from moe.comm.groups import Groups
from moe.config import EngineConfig
from moe.engine.engine import Engine
from moe.engine.grammar import Grammars
from moe.engine.layer_major import Workload
from moe.models.load import load_tokenizer


class Opened(NamedTuple):
    """tokenizer: None where the folder has none. grammars: of whoever checks requests before the engine has them."""

    engine: Engine
    tokenizer: Any
    grammars: Grammars


def here(model: str | Path, config: EngineConfig, groups: Groups | None, workload: Workload | None) -> Opened:
    """Its grammars are the engine's own, so that what a caller's thread compiled is there when its request begins."""
    engine = Engine(model, config, groups, work=workload)
    return Opened(engine, _tokenizer(model, config), engine.loaded.grammars)


def on_hosts(
    model: str | Path, config: EngineConfig, hosts: int, address: str | None, controller: str | None
) -> Opened:
    """The engine has of one what `LLM`, batch files and a service use; hosts have grammars of their own."""
    if config.batch.schedule == "layer_major":
        raise ValueError(
            "batch.schedule=layer_major splits a process's memory for the requests that it will have, which hosts "
            "hand to each other; use moe.launch.torchrun, or leave it out"
        )
    try:
        from moe.cluster.controller import ClusterEngine  # Ray is an optional extra
        from moe.cluster.remote import RemoteEngine
        from moe.cluster.resident import Controllers
    except ImportError as error:
        raise ValueError(f"hosts need Ray, which is not installed ({error}); pip install 'moeflow[ray]'") from None
    if controller is not None:
        engine = cast(Engine, RemoteEngine(model, config, hosts, Controllers(controller, address)))
    else:
        engine = cast(Engine, ClusterEngine(model, config, hosts, address=address))
    limits = engine.limits
    grammars = Grammars(Path(model), limits.vocabulary, limits.eos_ids, config.trust_remote_code)
    return Opened(engine, _tokenizer(model, config), grammars)


def _tokenizer(model: str | Path, config: EngineConfig) -> Any:
    return load_tokenizer(Path(model), trust_remote_code=config.trust_remote_code)
