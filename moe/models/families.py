"""How each family's experts modules are reached, and what their weights look like.

Families with transformers' ExpertsInterface declare their layout on the module (64 model folders). The others are
reached by a class of theirs, replaced through transformers' own patch mapping:

| class | what its forward gets | what ours does |
|---|---|---|
| DbrxExperts | hidden, top_k_index, top_k_weights | the same call |
| Llama4TextMoe | hidden; weights scale the experts' *input* | routes with its router, adds the shared expert |
| Step3p7Experts | hidden, top_k_index, top_k_weights | the same call |
| SwitchTransformersExperts | hidden, a one-hot mask, one weight | id = place of the 1, or -1 where it was dropped |

Experts of any other class stay resident, as transformers runs them; `why_resident` says why.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUTanh

from moe.kernels.weights import Activation, ActivationKind
from moe.offload.layout import ExpertSite


class FoundExperts(NamedTuple):
    """One layer's experts in a model that has no weights yet."""

    site: ExpertSite
    activation: Activation
    replaced: tuple[type[nn.Module], ...]  # classes to patch: the experts, and the block around them if need be


_PLAIN: tuple[tuple[ActivationKind, type[nn.Module] | tuple[type[nn.Module], ...]], ...] = (
    ("silu", (nn.SiLU, type(ACT2FN["silu"]))),
    ("gelu", (nn.GELU, type(ACT2FN["gelu"]))),
    ("gelu_tanh", (GELUTanh, type(ACT2FN["gelu_new"]))),
    ("relu", nn.ReLU),
    ("relu2", type(ACT2FN["relu2"])),
)


def _plain_activation(act: nn.Module, gated: bool) -> Activation:
    for kind, classes in _PLAIN:
        if isinstance(act, classes):
            return Activation(kind=kind, gated=gated)

    def apply(gate_up: Tensor) -> Tensor:
        if not gated:
            return act(gate_up)  # type: ignore[no-any-return]
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up  # type: ignore[no-any-return]

    return Activation(kind="custom", gated=gated, function=apply)


def _interface_activation(module: Any) -> Activation:
    """The activation of a module with the ExpertsInterface: known by value, else the module's own function."""
    kind = type(module).__name__
    if kind == "GptOssExperts":
        return Activation(kind="gpt_oss", interleaved=True, alpha=float(module.alpha), limit=float(module.limit))
    if not module.has_gate:
        return _plain_activation(module.act_fn, gated=False)
    if "_apply_gate" in _default_gates and type(module)._apply_gate is _default_gates["_apply_gate"]:
        return _plain_activation(module.act_fn, gated=True)
    return Activation(kind="custom", function=module._apply_gate)


def _find_default_gate() -> dict[str, Any]:
    from transformers.integrations import moe

    return {"_apply_gate": moe._default_apply_gate} if hasattr(moe, "_default_apply_gate") else {}


_default_gates = _find_default_gate()


# Blocks around experts whose initialiser reaches for the experts' weights.
_INITIALISING = ("SwitchTransformersSparseMLP", "Qwen3OmniMoeThinkerTextSparseMoeBlock")
# Why experts stay resident, by a name in their module's class.
_RESIDENT = {
    "MuseSpark": "a norm of its own follows each of its experts",
    "Ernie4_5_VLMoe": "its experts for text and those for images are stored in one list",
    "LongcatFlash": "experts without weights stand among the others",
    "JetMoe": "its attention chooses among experts too",
    "NllbMoe": "transformers takes its routing for indices, so that other experts run than were chosen",
}


def why_resident(model: nn.Module) -> str:
    """The reason why the experts of a model whose `find_experts` is empty are not in slots."""
    kinds = {type(module).__name__ for module in model.modules()}
    for name, reason in _RESIDENT.items():
        if any(name in kind for kind in kinds):
            return reason
    return "their modules declare no layout that is known here"


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """The experts that can live in slots, in order of layers. model: built on the meta device, unpatched."""
    found = []
    for name, module in model.named_modules():
        one = _find_one(name, module)
        if one is None:
            continue
        around = type(model.get_submodule(name.rpartition(".")[0]))
        if around.__name__ in _INITIALISING:
            one = one._replace(replaced=(*one.replaced, around))
        found.append(one)
    return found


def _find_one(name: str, module: Any) -> FoundExperts | None:
    kind = type(module).__name__
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        if getattr(module, "has_post_expert_norm", False) or kind == "Ernie4_5_VLMoeMoeExperts":
            return None  # see why_resident
        num_experts, *rest = module.down_proj.shape
        hidden, inner = rest[::-1] if module.is_transposed else rest
        site = ExpertSite(
            module=name,
            num_experts=num_experts,
            hidden_size=hidden,
            intermediate_size=inner,
            gated=module.has_gate,
            has_bias=module.has_bias,
            transposed=module.is_transposed,
            interleaved=(activation := _interface_activation(module)).interleaved,
        )
        return FoundExperts(site, activation, (type(module),))
    if kind == "Llama4TextMoe":
        num_experts, inner, hidden = module.experts.down_proj.shape
        site = ExpertSite(
            module=f"{name}.experts",
            num_experts=num_experts,
            hidden_size=hidden,
            intermediate_size=inner,
            transposed=True,
        )
        return FoundExperts(site, _plain_activation(module.experts.act_fn, True), (type(module), type(module.experts)))
    if kind == "Step3p7Experts":
        num_experts, hidden, inner = module.down_proj.shape
        site = ExpertSite(module=name, num_experts=num_experts, hidden_size=hidden, intermediate_size=inner)
        return FoundExperts(site, Activation(kind="custom", function=module._apply_gate), (type(module),))
    if kind == "DbrxExperts":
        site = ExpertSite(
            module=name,
            num_experts=module.num_experts,
            hidden_size=module.hidden_size,
            intermediate_size=module.ffn_hidden_size,
        )
        return FoundExperts(site, _plain_activation(module.mlp.activation_fn, True), (type(module),))
    if kind == "SwitchTransformersSparseMLP":
        experts = module.experts
        inner, hidden = experts.expert_0.wi.weight.shape
        site = ExpertSite(
            module=f"{name}.experts",
            num_experts=experts.num_experts,
            hidden_size=hidden,
            intermediate_size=inner,
            gated=False,
        )
        return FoundExperts(site, _plain_activation(experts.expert_0.act, False), (type(module), type(experts)))
    return None


def slot_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of an experts class (or the block around one) that has no weights and asks `self.compute` instead.

    `compute(hidden [T, H], topk_ids [T, K], topk_weights [T, K], scale_input) -> [T, H]` is set after loading.
    """
    if original.__name__ == "Llama4TextMoe":
        return type(original.__name__, (_Llama4Moe, original), {})
    if original.__name__ in _INITIALISING:
        return type(original.__name__, (_Initialised, original), {})
    base = _SwitchExperts if original.__name__ == "SwitchTransformersExperts" else _SlotExperts
    return type(original.__name__, (base, original), {})


class _Initialised(nn.Module):
    """In front of a block whose initialiser would reach for the weights of its experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_hf_initialized = True


class _SlotExperts(nn.Module):
    """In front of an experts class: drops what its constructor made, and computes from slots."""

    compute: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(*args, **kwargs)
        for name in [n for n, _ in self.named_parameters(recurse=False)]:
            delattr(self, name)
        for name, child in list(self.named_children()):
            if any(True for _ in child.parameters()):
                delattr(self, name)
        self._is_hf_initialized = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = self.compute(x, top_k_index, top_k_weights, False)
        return y.view(hidden_states.shape)  # type: ignore[no-any-return]


class _SwitchExperts(_SlotExperts):
    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        kept = selected_experts.amax(-1) > 0  # [T, 1]; a token over capacity has no expert
        topk_ids = selected_experts.argmax(-1).masked_fill(~kept, -1)
        return self.compute(hidden_states, topk_ids, routing_weights, False)  # type: ignore[no-any-return]


class _Llama4Moe(nn.Module):
    """Llama 4's block: expert input = router score x hidden state, results are summed without weights."""

    router: Any
    shared_expert: Any
    experts: Any
    top_k: int
    hidden_dim: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)  # [T, E], zero where not chosen
        topk_weights, topk_ids = scores.topk(self.top_k, dim=-1)
        routed = self.experts.compute(x, topk_ids, topk_weights, True)
        return self.shared_expert(x) + routed, logits
