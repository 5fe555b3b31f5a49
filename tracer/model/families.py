"""Where the parts of each architecture are: data, not code.

A `Family` names the embedding, the blocks, the final norm and the head, as Hugging Face calls them, and the kinds of
blocks: a `Layout` names the steps of one in the order they run. To add a family, append to `FAMILIES`; if it has a
module of a new kind, add its rule to model/rules.py first. A module that no rule covers makes the model refused, never
treated as linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import nn

from tracer.errors import ModelError
from tracer.model.rules import FACTORS


class Step(NamedTuple):
    """One module of a block: its kind (a key of `rules.RULE_OF`, or ``neurons`` for the down projection, whose
    input holds them) and its path from the block."""

    kind: str
    path: str


class Weight(NamedTuple):
    """A linear map of a block: the path of its module, and which of the module's outputs are meant.

    `part` is ``all``, ``first half``, ``last half`` (fused gate and up), ``values`` (the tail of a fused q|k|v), or
    ``values per head`` (q|k|v interleaved head by head).
    """

    path: str
    part: str = "all"


@dataclass(frozen=True)
class Wiring:
    """How the modules of a block feed each other: what the linear replay of edges needs (attribution/edges.py).

    Attributes:
        attention_in, attention_out, mlp_in, mlp_out: paths of the norms before and after each branch; None: no norm.
        value, output: the maps into and out of the attention pattern.
        gate, up: the maps into the neurons; `gate` is None where the MLP has one, both are where it is a mixture.
    """

    attention_in: str | None
    attention_out: str | None
    mlp_in: str | None
    mlp_out: str | None
    value: Weight
    output: Weight
    gate: Weight | None
    up: Weight | None


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in a block; paths are from the block (model/experts.py).

    Attributes:
        block: the module that a token enters and leaves.
        path: the experts, whose weights are fused: ``gate_up_proj`` and ``down_proj`` [expert, ...].
        router: what chooses among them.
        kind: class of the experts.
        routing: ``experts`` are called with what the router chose, or it is read from the router's ``scores`` of all.
        scaled: whether a router's weight multiplies an expert's ``output`` or its ``input``.
        transposed, interleaved: how weights lie: inputs before outputs; gate and up by turns.
        gating: ``product`` of act(gate) and up, or ``clamped`` (rules.gated).
        shared: an MLP that runs at every token; `shared_gate`: what its output is multiplied by, before a sigmoid.
    """

    kind: str
    block: str = "mlp"
    path: str = "mlp.experts"
    router: str = "mlp.gate"
    routing: str = "experts"
    scaled: str = "output"
    transposed: bool = False
    interleaved: bool = False
    gating: str = "product"
    shared: str | None = None
    shared_gate: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of every module that is named."""
        shared = [] if self.shared is None else [f"{self.shared}.{name}" for name in self.MAPS]
        return (self.block, self.path, self.router, *shared, *([] if self.shared_gate is None else [self.shared_gate]))

    MAPS: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")

    def covers(self, path: str, part: nn.Module) -> bool:
        """Whether a module without parts is one of a mixture's own, which the algebra of experts has."""
        if path == self.router:
            return True
        inside = path.startswith(self.path + ".") or (self.shared is not None and path.startswith(self.shared + "."))
        if path == self.path:
            return type(part).__name__ == self.kind
        return inside and type(part).__name__ in FACTORS


@dataclass(frozen=True)
class Layout:
    """One kind of block; paths are attribute paths from the block.

    Attributes:
        steps: the modules of a block that rules apply to, and its neurons, in the order they run.
        wiring: how they feed each other.
        experts: the mixture in the place of an MLP, if it has one: the step ``mixture``.
    """

    steps: tuple[Step, ...]
    wiring: Wiring
    experts: Experts | None = None

    @property
    def down(self) -> str:
        """Path in a block of what neurons leave through: the down projection, or the mixture."""
        return self.path("neurons" if self.experts is None else "mixture")

    @property
    def maps(self) -> frozenset[str]:
        """Paths in a block of every linear map that is read or replayed: each is one module, with its own weights."""
        wiring, shared = self.wiring, () if self.experts is None else self.experts.parts[3:]
        used = (wiring.value, wiring.output, wiring.up, wiring.gate)
        own = {self.down} if self.experts is None else set(shared)
        return frozenset({*own, *(weight.path for weight in used if weight is not None)})

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths in a block of every module that is named."""
        inside = () if self.experts is None else self.experts.parts
        return (*dict.fromkeys(step.path for step in self.steps), *sorted(self.maps), *inside)

    @property
    def gated(self) -> bool:
        """Whether its neurons have gates."""
        return self.experts is not None or self.wiring.gate is not None

    def path(self, kind: str) -> str:
        """Path in a block of the one step of this kind."""
        return next(step.path for step in self.steps if step.kind == kind)

    def missing(self, block: nn.Module) -> str | None:
        """Path of the first named module that a block lacks."""
        inside = {path for path, _ in block.named_modules(remove_duplicate=False)}
        return next((path for path in self.parts if path not in inside), None)


@dataclass(frozen=True)
class Family:
    """One architecture; paths are attribute paths from the model.

    Attributes:
        name: `config.model_type`.
        embedding, blocks, head: where they are; the embedding's output is what embedding nodes attribute to.
        final_norm: the norm before the head.
        layouts: the kinds of blocks; a block is of the first whose modules it has (`laid_out`).
        norm_offset: added to a norm's weight (Gemma: 1).
    """

    name: str
    embedding: str
    blocks: str
    final_norm: Step
    layouts: tuple[Layout, ...]
    head: str = "lm_head"
    norm_offset: float = 0.0

    def laid_out(self, module: nn.Module) -> tuple[Layout, ...]:
        """The layout of each of a model's blocks.

        Raises:
            ModelError: a block has none of them.
        """
        found = []
        for number, block in enumerate(_blocks(module, self.blocks)):
            layout = next((one for one in self.layouts if one.missing(block) is None), None)
            if layout is None:
                raise _lacks(module, self, f"{self.blocks}.{number}.{self.layouts[0].missing(block)}")
            found.append(layout)
        return tuple(found)


def _blocks(module: nn.Module, path: str) -> list[nn.Module]:
    """A model's blocks, in order."""
    return list(module.get_submodule(path).children())


def _lacks(module: nn.Module, family: Family, path: str) -> ModelError:
    return ModelError(
        f"module {type(module).__name__}",
        f"is no language model of the family {family.name!r}: it has no {path}",
        "load it with AutoModelForCausalLM",
    )


def _llama_like(name: str, *layouts: Layout, **more: Any) -> Family:
    return Family(name, "model.embed_tokens", "model.layers", Step("rms_norm", "model.norm"), layouts, **more)


ATTENTION = Step("attention", "self_attn")
QK_NORMS = (Step("rms_norm", "self_attn.q_norm"), Step("rms_norm", "self_attn.k_norm"))
BEFORE_ATTENTION = Step("rms_norm", "input_layernorm")
AFTER_ATTENTION = Step("rms_norm", "post_attention_layernorm")
BEFORE_MLP = Step("rms_norm", "pre_feedforward_layernorm")
AFTER_MLP = Step("rms_norm", "post_feedforward_layernorm")
PRODUCT = (Step("product", "mlp.down_proj"), Step("neurons", "mlp.down_proj"))
GATED = (Step("activation", "mlp.act_fn"), Step("gate", "mlp.act_fn"), *PRODUCT)
FUSED = (Step("activation", "mlp.activation_fn"), Step("gate", "mlp.activation_fn"), *PRODUCT)

PRE_NORM = (BEFORE_ATTENTION, ATTENTION, AFTER_ATTENTION, *GATED)
SANDWICH = (ATTENTION, AFTER_ATTENTION, BEFORE_MLP, *GATED, AFTER_MLP)

SEPARATE = Wiring(
    attention_in="input_layernorm",
    attention_out=None,
    mlp_in="post_attention_layernorm",
    mlp_out=None,
    value=Weight("self_attn.v_proj"),
    output=Weight("self_attn.o_proj"),
    gate=Weight("mlp.gate_proj"),
    up=Weight("mlp.up_proj"),
)
AROUND = replace(
    SEPARATE,
    attention_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
MIXTURE = replace(SEPARATE, gate=None, up=None)
BEHIND = replace(AROUND, attention_in=None, mlp_in=None)
FUSED_WIRING = replace(
    SEPARATE,
    value=Weight("self_attn.qkv_proj", "values"),
    gate=Weight("mlp.gate_up_proj", "first half"),
    up=Weight("mlp.gate_up_proj", "last half"),
)

PLAIN = Layout(PRE_NORM, SEPARATE)
WITH_QK_NORMS = Layout((BEFORE_ATTENTION, *QK_NORMS, ATTENTION, AFTER_ATTENTION, *GATED), SEPARATE)


def _mixture(experts: Experts, *before: Step) -> Layout:
    """A block with a mixture, norms in front of its branches, and steps in the attention."""
    steps = (BEFORE_ATTENTION, *before, ATTENTION, AFTER_ATTENTION, Step("mixture", experts.block))
    return Layout(steps, MIXTURE, experts)


QWEN2_EXPERTS = Experts("Qwen2MoeExperts", shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
GLM4_EXPERTS = Experts("Glm4MoeExperts", shared="mlp.shared_experts")
GPT_OSS_EXPERTS = Experts("GptOssExperts", router="mlp.router", transposed=True, interleaved=True, gating="clamped")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama_like("llama", PLAIN),
        _llama_like("mistral", PLAIN),
        _llama_like("qwen2", PLAIN),
        _llama_like("qwen3", WITH_QK_NORMS),
        _llama_like("gemma2", Layout((BEFORE_ATTENTION, *SANDWICH), AROUND), norm_offset=1.0),
        _llama_like("gemma3_text", Layout((BEFORE_ATTENTION, *QK_NORMS, *SANDWICH), AROUND), norm_offset=1.0),
        _llama_like("olmo2", Layout((*QK_NORMS, ATTENTION, AFTER_ATTENTION, *GATED, AFTER_MLP), BEHIND)),
        _llama_like("phi3", Layout((BEFORE_ATTENTION, ATTENTION, AFTER_ATTENTION, *FUSED), FUSED_WIRING)),
        _llama_like("mixtral", _mixture(Experts("MixtralExperts"))),
        _llama_like("qwen2_moe", _mixture(QWEN2_EXPERTS), PLAIN),
        _llama_like("qwen3_moe", _mixture(Experts("Qwen3MoeExperts"), *QK_NORMS), WITH_QK_NORMS),
        _llama_like("olmoe", _mixture(Experts("OlmoeExperts"), *QK_NORMS)),
        _llama_like("gpt_oss", _mixture(GPT_OSS_EXPERTS)),
        _llama_like(
            "glm4_moe",
            _mixture(GLM4_EXPERTS, *QK_NORMS),
            _mixture(GLM4_EXPERTS),
            WITH_QK_NORMS,
            PLAIN,
        ),
        Family(
            "gpt_neox",
            "gpt_neox.embed_in",
            "gpt_neox.layers",
            Step("layer_norm", "gpt_neox.final_layer_norm"),
            (
                Layout(
                    (
                        Step("layer_norm", "input_layernorm"),
                        Step("attention", "attention"),
                        Step("layer_norm", "post_attention_layernorm"),
                        Step("activation", "mlp.act"),
                        Step("neurons", "mlp.dense_4h_to_h"),
                    ),
                    Wiring(
                        attention_in="input_layernorm",
                        attention_out=None,
                        mlp_in="post_attention_layernorm",
                        mlp_out=None,
                        value=Weight("attention.query_key_value", "values per head"),
                        output=Weight("attention.dense"),
                        gate=None,
                        up=Weight("mlp.dense_h_to_4h"),
                    ),
                ),
            ),
        ),
        Family(
            "gpt2",
            "transformer.wte",
            "transformer.h",
            Step("layer_norm", "transformer.ln_f"),
            (
                Layout(
                    (
                        Step("layer_norm", "ln_1"),
                        Step("attention", "attn"),
                        Step("layer_norm", "ln_2"),
                        Step("activation", "mlp.act"),
                        Step("neurons", "mlp.c_proj"),
                    ),
                    Wiring(
                        attention_in="ln_1",
                        attention_out=None,
                        mlp_in="ln_2",
                        mlp_out=None,
                        value=Weight("attn.c_attn", "values"),
                        output=Weight("attn.c_proj"),
                        gate=None,
                        up=Weight("mlp.c_fc"),
                    ),
                ),
            ),
        ),
    )
}

TEXT_PARTS = {"gemma3": "gemma3_text"}
"""Types that take images beside text, and the family of their text part, which is loaded alone (multimodal.py)."""

# Module classes that are linear, or that do nothing in evaluation mode.
LINEAR = frozenset(
    "Linear Conv1D Embedding Dropout Identity Linear4bit Linear8bitLt "
    "Gemma2TextScaledWordEmbedding Gemma3TextScaledWordEmbedding".split()
)
NORM_CLASSES = {
    "rms_norm": frozenset(
        f"{name}RMSNorm"
        for name in (
            "Llama Mistral Qwen2 Qwen3 Gemma2 Gemma3 Olmo2 Phi3 Mixtral Qwen2Moe Qwen3Moe Olmoe GptOss Glm4Moe"
        ).split()
    ),
    "layer_norm": frozenset({"LayerNorm"}),
}
ROTARY = "RotaryEmbedding"


def family_of(module: nn.Module, config: Any) -> Family:
    """The family of a loaded (or meta) model, after checking that a rule covers every module in it.

    Raises:
        ModelError: names the first module that no rule covers, and what to add.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        check_inputs(config)
        path, name = _first_uncovered(module)
        raise ModelError(
            f"model type {kind!r}",
            f"no rule covers its module {path} ({name}); supported: {', '.join(FAMILIES)}",
            "add a Family to tracer/model/families.py, and the rule of each new module to tracer/model/rules.py",
        )
    _check_config(config)
    family = FAMILIES[kind]
    _check_parts(family, module)
    layouts = family.laid_out(module)
    _check_causal(family, layouts, module, config)
    for path, part in module.named_modules():
        number, _, inside = path.removeprefix(family.blocks + ".").partition(".")
        layout = layouts[int(number)] if path.startswith(family.blocks + ".") else None
        if not any(part.children()):
            _check_covered(family, layout, path, inside, part)
        elif layout is not None and inside in layout.maps:
            raise ModelError(
                f"module {path} ({type(part).__name__})",
                f"is made of several modules, where family {family.name!r} has one linear map",
                "load the model as it was, with what was added merged into its weights",
            )
    return family


def check_inputs(config: Any) -> None:
    """Refuse a model that takes images or sound beside text.

    Raises:
        ModelError: it does, by its configuration.
    """
    parts = getattr(config, "sub_configs", None) or {}
    if not any(name in parts for name in ("text_config", "vision_config", "audio_config")):
        return
    known = ", ".join(TEXT_PARTS)
    step = f"use a language model for text alone; of the types that have more, the text part of {known} is loaded"
    if config.model_type in TEXT_PARTS:
        step = "give its folder or Hugging Face id, from which its text part alone is loaded"
    raise ModelError(f"model type {config.model_type!r}", "takes other inputs beside text, which no rule covers", step)


def _check_parts(family: Family, module: nn.Module) -> None:
    """Refuse a model without a part that its family names: a bare backbone, or one with another head."""
    named = dict(module.named_modules())
    for path in (family.embedding, family.blocks, f"{family.blocks}.0", family.final_norm.path, family.head):
        if path not in named:
            raise _lacks(module, family, path)


def looks_ahead(config: Any) -> bool:
    """Whether the masks that a model makes let tokens attend to later ones."""
    both_ways = config.model_type == "gemma3_text" and getattr(config, "use_bidirectional_attention", False)
    return bool(both_ways) or not getattr(config, "is_causal", True)


def _check_covered(family: Family, layout: Layout | None, path: str, inside: str, part: nn.Module) -> None:
    """Refuse a leaf module that is not linear and is not one of its block's steps."""
    name = type(part).__name__
    if name in LINEAR or ROTARY in name:
        return
    if layout is not None and layout.experts is not None and layout.experts.covers(inside, part):
        return
    steps = (family.final_norm,) if layout is None else layout.steps
    kinds = [step.kind for step in steps if path.endswith("." + step.path) or path == step.path]
    if any(name in NORM_CLASSES.get(kind, FACTORS if kind == "activation" else ()) for kind in kinds):
        return
    where = "FACTORS in tracer/model/rules.py" if "activation" in kinds else "tracer/model/rules.py, and a Step for it"
    raise ModelError(
        f"module {path} ({name})",
        f"no RelP rule covers it in family {family.name!r}, and it is not linear",
        f"add its rule to {where}",
    )


def _check_config(config: Any) -> None:
    """Refuse the options of supported families whose computation no step describes."""
    if getattr(config, "add_cross_attention", False):
        raise ModelError("add_cross_attention=True", "no rule covers cross-attention", "use a decoder-only model")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise ModelError(
            "reorder_and_upcast_attn=True",
            "its attention bypasses the attention interface, so the pattern cannot be frozen",
            "load it with that option off",
        )


def _check_causal(family: Family, layouts: Sequence[Layout], module: nn.Module, config: Any) -> None:
    """Refuse an attention that looks at later tokens where the model makes causal masks: the mask is left out for a
    prompt alone and is there beside a padded one, so that its numbers would depend on its company."""
    if looks_ahead(config):
        return
    for number, (block, layout) in enumerate(zip(_blocks(module, family.blocks), layouts, strict=True)):
        path = layout.path("attention")
        if not getattr(block.get_submodule(path), "is_causal", True):
            raise ModelError(
                f"module {family.blocks}.{number}.{path} with is_causal False",
                f"attention looks at later tokens, but the masks of {family.name!r} are causal",
                "set is_causal in the model's configuration instead, which makes masks to match",
            )


def _first_uncovered(module: nn.Module) -> tuple[str, str]:
    """Path and class of the first leaf module that is neither linear nor known: the likeliest to need a rule."""
    leaves = [(path, type(part).__name__) for path, part in module.named_modules() if not any(part.children())]
    known = LINEAR | frozenset(FACTORS) | {"LayerNorm"}
    return next((leaf for leaf in leaves if leaf[1] not in known and ROTARY not in leaf[1]), leaves[0])
