"""Where the parts of each architecture are: data, not code.

A `Family` names the embedding, the blocks, the final norm and the head, as Hugging Face calls them, and the kinds of
blocks: a `Layout` names the steps of one in the order they run. To add a family, append to `FAMILIES`; if it has a
module of a new kind, add its rule to model/rules.py first. A module that no rule covers makes the model refused, never
treated as linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple

from torch import nn

from tracer.errors import ModelError, first_line
from tracer.model.rules import ACTIVATIONS
from tracer.model.wholes import check_inputs


class Step(NamedTuple):
    """One module of a block: its kind (a key of `rules.RULE_OF`, or ``neurons`` for the down projection, whose
    input holds them) and its path from the block; a path that ends in ``.*`` is every module of that list."""

    kind: str
    path: str


class Weight(NamedTuple):
    """A linear map of a block: the path of its module, and which of the module's outputs are meant.

    `part` is ``all``, ``first half``, ``last half`` (fused gate and up), ``values`` (the tail of a fused q|k|v),
    ``values per head`` (q|k|v head by head: for each head of keys and values, the queries that share it, the key, the
    value), ``latent`` (what the map behind it reads, before a rotated key), ``values of heads`` (the tail of each
    head's k|v) or ``tail`` (as much as the map out of the heads reads).
    """

    path: str
    part: str = "all"


@dataclass(frozen=True)
class Wiring:
    """How the modules of a block feed each other: what the linear replay of edges needs.

    Attributes:
        attention_in, attention_out, mlp_in, mlp_out: paths of the norms before and after each branch; None: no norm.
        value, output: the maps into and out of the attention pattern; `value` is None where a block attends to the
            values of an earlier one.
        gate, up: the maps into the neurons; `gate` is None where the MLP has one, both are where it is a mixture.
        latent, latent_norm: the map before `value`, and the norm between them, where heads share a latent.
        parallel: whether attention and MLP both read the block's input; or the option that says so.
        value_norm: path of a norm without weights that values go through, head by head; None: no norm.
        scalar: a number of the block, by which it multiplies the residual stream that leaves it; None: by none.
        in_place: whether the block adds to what its MLP gives in place, so that a copy has to go on.
        value_conv: path of the short convolution over positions behind `value`, with a SiLU behind it.
        heads_norm: path of the norm, with a gate, of each head's mixed values.
    """

    attention_in: str | None
    attention_out: str | None
    mlp_in: str | None
    mlp_out: str | None
    value: Weight | None
    output: Weight
    gate: Weight | None
    up: Weight | None
    parallel: bool | str = False
    latent: Weight | None = None
    latent_norm: str | None = None
    value_norm: str | None = None
    value_conv: str | None = None
    heads_norm: str | None = None
    scalar: str | None = None
    in_place: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms before and after each branch, each once."""
        given = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return tuple(dict.fromkeys(path for path in given if path is not None))


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

    @property
    def read(self) -> tuple[str, ...]:
        """Paths of the modules whose weights neurons are computed from."""
        return (self.path, *self.parts[3:])

    def covers(self, path: str, part: nn.Module) -> bool:
        """Whether a module without parts is one of a mixture's own, which the algebra of experts has."""
        if path == self.router:
            return True
        inside = path.startswith(self.path + ".") or (self.shared is not None and path.startswith(self.shared + "."))
        if path == self.path:
            return type(part).__name__ == self.kind
        return inside and type(part).__name__ in ACTIVATIONS


@dataclass(frozen=True)
class Layout:
    """One kind of block; paths are attribute paths from the block.

    Attributes:
        steps: the modules of a block that rules apply to, and its neurons, in the order they run.
        wiring: how they feed each other.
        experts: the mixture in the place of an MLP, if it has one: the step ``mixture``.
        of_pattern: paths of modules that queries and keys alone go through, where a block has them, and that no step
            linearises: without rule 2 the others cannot be applied.
        replayed: whether that is all that the linear replay has to know of the block; if not, edges and profiles are
            found by gradients alone.
    """

    steps: tuple[Step, ...]
    wiring: Wiring
    experts: Experts | None = None
    of_pattern: tuple[str, ...] = ()
    replayed: bool = True

    @property
    def down(self) -> str:
        """Path in a block of what neurons leave through: the down projection, or the mixture."""
        return self.path("neurons" if self.experts is None else "mixture")

    @property
    def maps(self) -> frozenset[str]:
        """Paths in a block of every linear map that is read or replayed: each is one module, with its own weights."""
        wiring, shared = self.wiring, () if self.experts is None else self.experts.parts[3:]
        used = (wiring.value, wiring.output, wiring.up, wiring.gate, wiring.latent)
        short = () if wiring.value_conv is None else (wiring.value_conv,)
        own = {self.down} if self.experts is None else set(shared)
        return frozenset({*own, *short, *(weight.path for weight in used if weight is not None)})

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths in a block of every module that is named."""
        inside = () if self.experts is None else self.experts.parts
        return (*dict.fromkeys(step.path.removesuffix(".*") for step in self.steps), *sorted(self.maps), *inside)

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

    def spelled(self, block: nn.Module) -> Layout:
        """The layout with a step for each module of a list in a block, in the place of the list's."""
        steps = list[Step]()
        for step in self.steps:
            path = step.path.removesuffix(".*")
            names = (
                [path]
                if path == step.path
                else [f"{path}.{name}" for name, _ in block.get_submodule(path).named_children()]
            )
            steps += [Step(step.kind, name) for name in names]
        return replace(self, steps=tuple(steps))


class Scales(NamedTuple):
    """Constants that a family multiplies by, each as the option of its configuration that has it.

    Attributes:
        embedding: of what the embedding gives, before the first block.
        branch: of what attention and MLP each write into the residual stream.
        logits: of what the head gives. divided: the same, if the option divides.
        deep: as `branch`, of an option that is divided by the root of the number of blocks.
    """

    embedding: str | None = None
    branch: str | None = None
    logits: str | None = None
    divided: str | None = None
    deep: str | None = None

    def of(self, config: Any) -> tuple[float, float, float]:
        """The constants of a model: of its embedding, its branches and its logits."""
        given = (1.0 if name is None else float(getattr(config, name)) for name in self)
        embedding, branch, logits, divided, deep = given
        if self.deep is not None:
            branch = deep / config.num_hidden_layers**0.5
        return embedding, branch, logits / divided


NO_SCALES = Scales()


class Refused(NamedTuple):
    """An option of a family that computes what no step describes: why, and what to do instead; but for the `harmless`
    values."""

    option: str
    rule: str
    step: str
    harmless: tuple[Any, ...] = (None, False)


@dataclass(frozen=True)
class Family:
    """One architecture; paths are attribute paths from the model.

    Attributes:
        name: `config.model_type`.
        embedding, blocks, head: where they are; the embedding's output is what embedding nodes attribute to.
        final_norm: the norm before the head.
        layouts: the kinds of blocks; a block is of the first whose modules it has (`laid_out`).
        norm_offset: added to a norm's weight (Gemma: 1).
        scales: constants that are no module.
        constants: norms before the blocks whose outputs the linearisation holds, where they are.
        refused: options that are not covered.
    """

    name: str
    embedding: str
    blocks: str
    final_norm: Step
    layouts: tuple[Layout, ...]
    head: str = "lm_head"
    norm_offset: float = 0.0
    scales: Scales = NO_SCALES
    constants: tuple[Step, ...] = ()
    refused: tuple[Refused, ...] = ()

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
            found.append(layout.spelled(block))
        return tuple(found)


def inputs_of(part: Any) -> int:
    """How many numbers a linear map takes."""
    return int(getattr(part, "in_features", None) or part.weight.shape[0])


def value_heads(block: nn.Module, layout: Layout, n_heads: int) -> int:
    """Heads of values that a block has maps for, by their widths: configurations call them by many names.

    Args:
        n_heads: of queries.
    """
    if layout.wiring.value is None:
        return 0
    value: Any = block.get_submodule(layout.wiring.value.path)
    if layout.wiring.value.part in ("values of heads", "tail"):
        return n_heads
    size = inputs_of(block.get_submodule(layout.wiring.output.path)) // n_heads
    count = int(getattr(value, "out_features", None) or value.weight.shape[1]) // size
    return count if layout.wiring.value.part == "all" else (count - n_heads) // 2


def _blocks(module: nn.Module, path: str) -> list[nn.Module]:
    """A model's blocks, in order."""
    return list(module.get_submodule(path).children())


def _lacks(module: nn.Module, family: Family, path: str) -> ModelError:
    return ModelError(
        f"module {type(module).__name__}",
        f"is no language model of the family {family.name!r}: it has no {path}",
        "load it with AutoModelForCausalLM",
    )


def _llama_like(name: str, *layouts: Layout, final: str = "rms_norm", **more: Any) -> Family:
    return Family(name, "model.embed_tokens", "model.layers", Step(final, "model.norm"), layouts, **more)


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
HALVES = {"gate": Weight("mlp.gate_up_proj", "first half"), "up": Weight("mlp.gate_up_proj", "last half")}
FUSED_WIRING = replace(SEPARATE, value=Weight("self_attn.qkv_proj", "values"), **HALVES)

PLAIN_UNGATED = replace(SEPARATE, gate=None)
ABREAST = replace(SEPARATE, mlp_in="input_layernorm", parallel=True)

CENTRED_BEFORE_ATTENTION = Step("layer_norm", "input_layernorm")
CENTRED_AFTER_ATTENTION = Step("layer_norm", "post_attention_layernorm")
CENTRED_QK_NORMS = (Step("layer_norm", "self_attn.q_norm"), Step("layer_norm", "self_attn.k_norm"))
PHI_QK_NORMS = (Step("layer_norm", "self_attn.q_layernorm"), Step("layer_norm", "self_attn.k_layernorm"))
STABLE_QK_NORMS = tuple(Step(kind, f"{path}.norms.*") for kind, path in PHI_QK_NORMS)
UNGATED = (Step("activation", "mlp.act_fn"), Step("neurons", "mlp.down_proj"))
LATENT_WIRING = replace(
    SEPARATE,
    latent=Weight("self_attn.kv_a_proj_with_mqa", "latent"),
    latent_norm="self_attn.kv_a_layernorm",
    value=Weight("self_attn.kv_b_proj", "values of heads"),
)

PLAIN = Layout(PRE_NORM, SEPARATE)
QK_NORMED = Layout((BEFORE_ATTENTION, *QK_NORMS, ATTENTION, AFTER_ATTENTION, *GATED), SEPARATE)
POST_NORM = Layout((*QK_NORMS, ATTENTION, AFTER_ATTENTION, *GATED, AFTER_MLP), BEHIND)
GLM = Layout((BEFORE_ATTENTION, ATTENTION, AFTER_ATTENTION, *FUSED), replace(SEPARATE, **HALVES))
BEHIND_ATTENTION, BEHIND_MLP = "post_self_attn_layernorm", "post_mlp_layernorm"
GLM4 = Layout(
    (
        BEFORE_ATTENTION,
        ATTENTION,
        Step("rms_norm", BEHIND_ATTENTION),
        AFTER_ATTENTION,
        *FUSED,
        Step("rms_norm", BEHIND_MLP),
    ),
    replace(GLM.wiring, attention_out=BEHIND_ATTENTION, mlp_out=BEHIND_MLP),
)
NEMOTRON = Layout((CENTRED_BEFORE_ATTENTION, ATTENTION, CENTRED_AFTER_ATTENTION, *UNGATED), PLAIN_UNGATED)
HUNYUAN = Layout(
    (
        BEFORE_ATTENTION,
        Step("rms_norm", "self_attn.query_layernorm"),
        Step("rms_norm", "self_attn.key_layernorm"),
        ATTENTION,
        AFTER_ATTENTION,
        *GATED,
    ),
    SEPARATE,
)
OPENED = Layout(
    (BEFORE_ATTENTION, *QK_NORMS, ATTENTION, Step("output_gate", "self_attn"), AFTER_ATTENTION, *GATED), SEPARATE
)
"""With a gate on what the attention has mixed."""


def _delta(value: Weight, output: str, norm: str) -> Layout:
    """A gated delta net in the place of attention: linear in its values once queries, keys, decays and gates are given.

    Args:
        value: the map into its values. output: path of the one out of its heads. norm: of the norm before that.
    """
    return Layout(
        (
            BEFORE_ATTENTION,
            Step("delta_values", "linear_attn"),
            Step("delta", "linear_attn"),
            Step("norm_gate", norm),
            Step("rms_norm", norm),
            AFTER_ATTENTION,
            *GATED,
        ),
        replace(SEPARATE, value=value, output=Weight(output), value_conv="linear_attn.conv1d", heads_norm=norm),
    )


DELTA = _delta(Weight("linear_attn.in_proj_qkv", "tail"), "linear_attn.out_proj", "linear_attn.norm")
SEPARATE_DELTA = _delta(Weight("linear_attn.v_proj"), "linear_attn.o_proj", "linear_attn.o_norm")
LATENT_NORM = Step("rms_norm", "self_attn.kv_a_layernorm")
LATENT = Layout((BEFORE_ATTENTION, LATENT_NORM, ATTENTION, AFTER_ATTENTION, *GATED), LATENT_WIRING)
"""Multi-head latent attention: keys and values come of a latent that all heads share, queries of one map, or of two."""
LATENT_QUERIES = replace(
    LATENT, steps=(BEFORE_ATTENTION, Step("rms_norm", "self_attn.q_a_layernorm"), *LATENT.steps[1:])
)

OWN_EMBEDDINGS = (Step("activation", "act_fn"), Step("rms_norm", "post_per_layer_input_norm"))
"""Of Gemma 4 E4B: behind its MLP a block adds a map of its stream, times embeddings of its own for the token. As a gate
they are constants, by the attention's rule."""


def _gemma4(value: str | None, own: tuple[Step, ...] = ()) -> Layout:
    """A block of Gemma 4, whose values come from a map of their own, from the keys' or from an earlier block."""
    wiring = replace(AROUND, scalar="layer_scalar", value=None)
    if value is None:
        return Layout((BEFORE_ATTENTION, QK_NORMS[0], *SANDWICH, *own), wiring, replayed=False)
    wiring = replace(wiring, value=Weight(value), value_norm="self_attn.v_norm")
    steps = (BEFORE_ATTENTION, *QK_NORMS, Step("rms_norm", "self_attn.v_norm"), *SANDWICH, *own)
    return Layout(steps, wiring, replayed=not own)


GPT2 = Layout(
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
)
WITHOUT = "use a model without it"
SILU_ALONE = Refused(
    "hidden_act", "the rule for a delta net's convolution is that of SiLU", WITHOUT, (None, "silu", "swish")
)
NO_CROSS_ATTENTION = Refused("add_cross_attention", "no rule covers cross-attention", "use a decoder-only model")
CAUSAL_ALONE = Refused(
    "is_causal",
    "its blocks do not pass on to their attention that it looks at later tokens, as its masks let it",
    "use a causal model",
    harmless=(None, True),
)
FALCON = Wiring(
    attention_in="input_layernorm",
    attention_out=None,
    mlp_in="post_attention_layernorm",
    mlp_out=None,
    value=Weight("self_attention.query_key_value", "values per head"),
    output=Weight("self_attention.dense"),
    gate=None,
    up=Weight("mlp.dense_h_to_4h"),
)
FALCON_ATTENTION = Step("attention", "self_attention")
FALCON_MLP = (Step("activation", "mlp.act"), Step("neurons", "mlp.dense_4h_to_h"))
FALCON_PARALLEL = replace(FALCON, mlp_in="input_layernorm", parallel=True, in_place=True)

GRANITE_SCALES = Scales("embedding_multiplier", "residual_multiplier", divided="logits_scaling")


def _mixture(experts: Experts, *before: Step, wiring: Wiring = MIXTURE, **more: Any) -> Layout:
    """A block with a mixture, norms in front of its branches, and steps in the attention."""
    steps = (BEFORE_ATTENTION, *before, ATTENTION, AFTER_ATTENTION, Step("mixture", experts.block))
    return Layout(steps, wiring, experts=experts, **more)


def _latent_mixture(experts: Experts) -> tuple[Layout, ...]:
    """A block with latent attention and a mixture, and those with an MLP."""
    wiring, queries = replace(LATENT_WIRING, gate=None, up=None), LATENT_QUERIES.steps[1]
    two = _mixture(experts, queries, LATENT_NORM, wiring=wiring), _mixture(experts, LATENT_NORM, wiring=wiring)
    return (two[0], LATENT_QUERIES, two[1], LATENT)


QWEN2_EXPERTS = Experts("Qwen2MoeExperts", shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
GLM4_EXPERTS = Experts("Glm4MoeExperts", shared="mlp.shared_experts")
LLAMA4_EXPERTS = Experts(
    "Llama4TextExperts",
    block="feed_forward",
    path="feed_forward.experts",
    router="feed_forward.router",
    routing="scores",
    scaled="input",
    transposed=True,
    shared="feed_forward.shared_expert",
)
LLAMA4_MLP = Layout(
    (
        BEFORE_ATTENTION,
        ATTENTION,
        AFTER_ATTENTION,
        Step("activation", "feed_forward.activation_fn"),
        Step("gate", "feed_forward.activation_fn"),
        Step("product", "feed_forward.down_proj"),
        Step("neurons", "feed_forward.down_proj"),
    ),
    replace(SEPARATE, gate=Weight("feed_forward.gate_proj"), up=Weight("feed_forward.up_proj")),
    of_pattern=("self_attn.qk_norm",),
)
LLAMA4 = _mixture(LLAMA4_EXPERTS, of_pattern=LLAMA4_MLP.of_pattern), LLAMA4_MLP
GPT_OSS_EXPERTS = Experts("GptOssExperts", router="mlp.router", transposed=True, interleaved=True, gating="clamped")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama_like("llama", PLAIN),
        _llama_like("mistral", PLAIN),
        _llama_like("qwen2", PLAIN),
        _llama_like("qwen3", QK_NORMED),
        _llama_like("gemma2", Layout((BEFORE_ATTENTION, *SANDWICH), AROUND), norm_offset=1.0),
        _llama_like("gemma3_text", Layout((BEFORE_ATTENTION, *QK_NORMS, *SANDWICH), AROUND), norm_offset=1.0),
        _llama_like("olmo2", POST_NORM),
        _llama_like("phi3", Layout((BEFORE_ATTENTION, ATTENTION, AFTER_ATTENTION, *FUSED), FUSED_WIRING)),
        _llama_like("mixtral", _mixture(Experts("MixtralExperts"))),
        _llama_like("qwen2_moe", _mixture(QWEN2_EXPERTS), PLAIN),
        _llama_like("qwen3_moe", _mixture(Experts("Qwen3MoeExperts"), *QK_NORMS), QK_NORMED),
        _llama_like("olmoe", _mixture(Experts("OlmoeExperts"), *QK_NORMS)),
        _llama_like("gpt_oss", _mixture(GPT_OSS_EXPERTS)),
        _llama_like(
            "glm4_moe",
            _mixture(GLM4_EXPERTS, *QK_NORMS),
            _mixture(GLM4_EXPERTS),
            QK_NORMED,
            PLAIN,
        ),
        _llama_like("deepseek_v2", *_latent_mixture(Experts("DeepseekV2Experts", shared="mlp.shared_experts"))),
        _llama_like("deepseek_v3", *_latent_mixture(Experts("DeepseekV3Experts", shared="mlp.shared_experts"))),
        _llama_like("llama4_text", *LLAMA4),
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
                        parallel="use_parallel_residual",
                    ),
                ),
            ),
        ),
        Family(
            "gpt2",
            "transformer.wte",
            "transformer.h",
            Step("layer_norm", "transformer.ln_f"),
            (GPT2,),
            refused=(
                NO_CROSS_ATTENTION,
                Refused(
                    "reorder_and_upcast_attn",
                    "its attention bypasses the attention interface, so the pattern cannot be frozen",
                    "load it with that option off",
                ),
            ),
        ),
        Family(
            "falcon",
            "transformer.word_embeddings",
            "transformer.h",
            Step("layer_norm", "transformer.ln_f"),
            (
                Layout(
                    (Step("layer_norm", "ln_attn"), Step("layer_norm", "ln_mlp"), FALCON_ATTENTION, *FALCON_MLP),
                    replace(FALCON_PARALLEL, attention_in="ln_attn", mlp_in="ln_mlp"),
                ),
                Layout(
                    (
                        Step("layer_norm", "input_layernorm"),
                        FALCON_ATTENTION,
                        Step("layer_norm", "post_attention_layernorm"),
                        *FALCON_MLP,
                    ),
                    FALCON,
                ),
                Layout((Step("layer_norm", "input_layernorm"), FALCON_ATTENTION, *FALCON_MLP), FALCON_PARALLEL),
            ),
        ),
        _llama_like(
            "cohere2",
            Layout((CENTRED_BEFORE_ATTENTION, ATTENTION, *GATED), ABREAST),
            final="layer_norm",
            scales=Scales(logits="logit_scale"),
        ),
        _llama_like("glm", GLM),
        _llama_like("glm4", GLM4),
        _llama_like("ministral", PLAIN),
        _llama_like("ministral3", PLAIN),
        _llama_like(
            "nemotron",
            NEMOTRON,
            norm_offset=1.0,
            final="layer_norm",
            refused=(CAUSAL_ALONE,),
        ),
        _llama_like("exaone4", POST_NORM),
        _llama_like("seed_oss", PLAIN),
        _llama_like("hunyuan_v1_dense", HUNYUAN),
        _llama_like("ernie4_5", PLAIN),
        _llama_like(
            "gemma4_text",
            *(
                _gemma4(value, own)
                for own in (OWN_EMBEDDINGS, ())
                for value in ("self_attn.v_proj", "self_attn.k_proj", None)
            ),
            constants=(Step("rms_norm", "model.per_layer_projection_norm"),),
            refused=(
                Refused("enable_moe_block", "a block's experts run beside its MLP, which no rule covers", WITHOUT),
                Refused("use_double_wide_mlp", "layers have different numbers of neurons", WITHOUT),
            ),
        ),
        Family(
            "gpt_bigcode",
            "transformer.wte",
            "transformer.h",
            Step("layer_norm", "transformer.ln_f"),
            (replace(GPT2, wiring=replace(GPT2.wiring, value=Weight("attn.c_attn", "values per head"))),),
            refused=(NO_CROSS_ATTENTION,),
        ),
        Family(
            "gptj",
            "transformer.wte",
            "transformer.h",
            Step("layer_norm", "transformer.ln_f"),
            (
                Layout(
                    (
                        Step("layer_norm", "ln_1"),
                        Step("attention", "attn"),
                        Step("activation", "mlp.act"),
                        Step("neurons", "mlp.fc_out"),
                    ),
                    Wiring(
                        attention_in="ln_1",
                        attention_out=None,
                        mlp_in="ln_1",
                        mlp_out=None,
                        value=Weight("attn.v_proj"),
                        output=Weight("attn.out_proj"),
                        gate=None,
                        up=Weight("mlp.fc_in"),
                        parallel=True,
                    ),
                ),
            ),
        ),
        _llama_like("smollm3", PLAIN),
        _llama_like(
            "olmo",
            Layout((CENTRED_BEFORE_ATTENTION, ATTENTION, CENTRED_AFTER_ATTENTION, *GATED), SEPARATE),
            final="layer_norm",
            refused=(
                Refused(
                    "clip_qkv",
                    "clips the values that attention carries, for which there is no rule",
                    "use a checkpoint without it, like the first OLMo 1B and 7B",
                ),
            ),
        ),
        _llama_like("olmo3", POST_NORM),
        _llama_like("gemma", PLAIN, norm_offset=1.0),
        _llama_like("granite", PLAIN, scales=GRANITE_SCALES),
        _llama_like("helium", PLAIN),
        _llama_like("arcee", Layout((BEFORE_ATTENTION, ATTENTION, AFTER_ATTENTION, *UNGATED), PLAIN_UNGATED)),
        _llama_like(
            "apertus",
            Layout(
                (
                    Step("rms_norm", "attention_layernorm"),
                    *QK_NORMS,
                    ATTENTION,
                    Step("rms_norm", "feedforward_layernorm"),
                    *UNGATED,
                ),
                replace(PLAIN_UNGATED, attention_in="attention_layernorm", mlp_in="feedforward_layernorm"),
            ),
        ),
        Family(
            "starcoder2",
            "model.embed_tokens",
            "model.layers",
            Step("layer_norm", "model.norm"),
            (
                Layout(
                    (
                        CENTRED_BEFORE_ATTENTION,
                        ATTENTION,
                        CENTRED_AFTER_ATTENTION,
                        Step("activation", "mlp.act"),
                        Step("neurons", "mlp.c_proj"),
                    ),
                    replace(SEPARATE, gate=None, up=Weight("mlp.c_fc")),
                ),
            ),
        ),
        _llama_like(
            "stablelm",
            *(
                Layout((CENTRED_BEFORE_ATTENTION, *norms, ATTENTION, *after, *GATED), wiring)
                for norms in (STABLE_QK_NORMS, ())
                for after, wiring in (((CENTRED_AFTER_ATTENTION,), SEPARATE), ((), ABREAST))
            ),
            final="layer_norm",
            refused=(CAUSAL_ALONE,),
        ),
        _llama_like(
            "cohere",
            *(
                Layout((CENTRED_BEFORE_ATTENTION, *norms, ATTENTION, *GATED), ABREAST)
                for norms in (CENTRED_QK_NORMS, ())
            ),
            final="layer_norm",
            scales=Scales(logits="logit_scale"),
        ),
        Family(
            "phi",
            "model.embed_tokens",
            "model.layers",
            Step("layer_norm", "model.final_layernorm"),
            tuple(
                Layout(
                    (
                        CENTRED_BEFORE_ATTENTION,
                        *norms,
                        ATTENTION,
                        Step("activation", "mlp.activation_fn"),
                        Step("neurons", "mlp.fc2"),
                    ),
                    replace(ABREAST, output=Weight("self_attn.dense"), gate=None, up=Weight("mlp.fc1")),
                )
                for norms in (PHI_QK_NORMS, ())
            ),
        ),
        _llama_like("youtu", LATENT_QUERIES, LATENT),
        _llama_like("granite_swa", PLAIN, scales=GRANITE_SCALES),
        _llama_like("minicpm3", LATENT_QUERIES, LATENT, scales=Scales(divided="logits_scaling", deep="scale_depth")),
        _llama_like("qwen3_5_text", OPENED, DELTA, norm_offset=1.0, refused=(SILU_ALONE,)),
        _llama_like("olmo_hybrid", POST_NORM, SEPARATE_DELTA, refused=(SILU_ALONE,)),
    )
}


UNLIKE_ATTENTION = {
    "linear_attention": "a recurrent state of a form that no rule covers",
    "recurrent": "a recurrent state whose gates no rule covers",
    "hybrid": "attention beside a recurrent state, which no rule covers",
    "hybrid_sliding": "attention beside a recurrent state, which no rule covers",
    "conv": "a convolution between two gates: no rule shares what three factors give",
    "indexed_attention": "an attention to what an index picks, which no rule covers",
    "compressed_sparse_attention": "an attention to compressed tokens, which no rule covers",
    "heavily_compressed_attention": "an attention to compressed tokens, which no rule covers",
    "mamba": "a state space, of which no rule says what is a constant",
}
"""Layers that are no attention to all earlier tokens, as configurations call their kinds, and what they have."""

# Module classes that are linear, or that do nothing in evaluation mode.
LINEAR = frozenset(
    "Linear FalconLinear Conv1D Embedding Dropout Identity Linear4bit Linear8bitLt GemmaTextScaledWordEmbedding "
    "Gemma2TextScaledWordEmbedding Gemma3TextScaledWordEmbedding Gemma4TextScaledWordEmbedding "
    "MiniCPM3ScaledWordEmbedding".split()
)
NORM_CLASSES = {
    "rms_norm": frozenset(
        f"{name}RMSNorm"
        for name in (
            "Llama Mistral Qwen2 Qwen3 Gemma2 Gemma3 Olmo2 Phi3 SmolLM3 Olmo3 Gemma Granite Helium Arcee Apertus Glm "
            "Glm4 Ministral Ministral3 Exaone4 SeedOss HunYuanDenseV1 Ernie4_5 Gemma4 Youtu "
            "GraniteSWA MiniCPM3 Qwen3_5 OlmoHybrid Mixtral Qwen2Moe Qwen3Moe Olmoe GptOss Glm4Moe DeepseekV2 "
            "DeepseekV3 Llama4Text"
        ).split()
    )
    | {"Qwen3_5RMSNormGated", "OlmoHybridRMSNormGated"},
    "layer_norm": frozenset("LayerNorm OlmoLayerNorm CohereLayerNorm Cohere2LayerNorm NemotronLayerNorm1P".split()),
}
OF_CONSTANTS = ("dt_bias", "e_score_correction_bias")
"""How names of biases end that only constants of the linearisation depend on: a decay, and the choice of experts."""
ROTARY = "RotaryEmbedding"
GROUP = "neuron_tracer.families"
"""Of entry points by which packages register families of their own."""
_discovered = set[str]()


def family_of(module: nn.Module, config: Any) -> Family:
    """The family of a loaded (or meta) model, after checking that a rule covers every module in it.

    Raises:
        ModelError: names the first module that no rule covers, and what to add.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        discover()
    if kind not in FAMILIES:
        check_inputs(config)
        path, name = _first_uncovered(module)
        raise ModelError(
            f"model type {kind!r}",
            f"no rule covers its module {path} ({name}){_unlike_attention(config)}; supported: {listed()}",
            "register one with tracer.register_family, or add a Family to tracer/model/families.py, and the rule of "
            "each new module to tracer/model/rules.py",
        )
    family = FAMILIES[kind]
    _check_config(family, config)
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


def listed() -> str:
    """The families' names, as a message has them."""
    first, rest = list(FAMILIES)[:8], len(FAMILIES) - 8
    return f"{', '.join(first)} and {rest} more (docs/families.md)"


def discover() -> None:
    """Let every installed package that has families register them (see registry.py), each once in a process.

    Raises:
        ModelError: names the package that cannot.
    """
    for point in entry_points(group=GROUP):
        if point.value in _discovered:
            continue
        try:
            point.load()()
        except Exception as error:  # whatever a package of someone else's does
            dist = "" if point.dist is None else f" of the package {point.dist.name}"
            step = f"it must be a function without arguments that calls tracer.register_family: mend it{dist}"
            raise ModelError(f"entry point {GROUP} {point.name}{dist}", first_line(error), step) from error
        _discovered.add(point.value)


def _unlike_attention(config: Any) -> str:
    """Which layers of a model are no attention, and why their way from token to token is no constant so far."""
    given = (getattr(config, name, None) for name in ("layers_block_type", "layer_types"))
    kinds = next((list(one) for one in given if one), [])
    found = []
    for kind, why in UNLIKE_ATTENTION.items():
        layers = [str(layer) for layer, one in enumerate(kinds) if one == kind]
        if layers:
            shown = ", ".join(layers[:4]) + (", ..." if len(layers) > 4 else "")
            found.append(f"; its {len(layers)} layers of kind {kind!r} ({shown}) have {why}")
    return "".join(found)


def _check_parts(family: Family, module: nn.Module) -> None:
    """Refuse a model without a part that its family names: a bare backbone, or one with another head."""
    named = dict(module.named_modules())
    for path in (family.embedding, family.blocks, f"{family.blocks}.0", family.final_norm.path, family.head):
        if path not in named:
            raise _lacks(module, family, path)


def is_biased(module: nn.Module) -> bool:
    """Whether any linear map or norm of a model has a bias, from which no relevance goes on to a neuron or a token."""
    biases = [name for name, _ in module.named_parameters() if name.endswith("bias")]
    return any(not name.endswith(OF_CONSTANTS) for name in biases)


def looks_ahead(config: Any) -> bool:
    """Whether the masks that a model makes let tokens attend to later ones."""
    both_ways = config.model_type == "gemma3_text" and getattr(config, "use_bidirectional_attention", False)
    return bool(both_ways) or not getattr(config, "is_causal", True)


def _check_covered(family: Family, layout: Layout | None, path: str, inside: str, part: nn.Module) -> None:
    """Refuse a leaf module that is not linear and is not one of its block's steps."""
    name = type(part).__name__
    short = None if layout is None else layout.wiring.value_conv
    if name in LINEAR or ROTARY in name or (short is not None and path.endswith("." + short)):
        return
    mixture = None if layout is None else layout.experts
    if layout is not None and (inside in layout.of_pattern or (mixture and mixture.covers(inside, part))):
        return
    steps = (family.final_norm, *family.constants) if layout is None else layout.steps
    kinds = [step.kind for step in steps if path.endswith("." + step.path) or path == step.path]
    if any(name in NORM_CLASSES.get(kind, ACTIVATIONS if kind == "activation" else ()) for kind in kinds):
        return
    where = "FACTORS in tracer/model/rules.py" if "activation" in kinds else "tracer/model/rules.py, and a Step for it"
    raise ModelError(
        f"module {path} ({name})",
        f"no RelP rule covers it in family {family.name!r}, and it is not linear",
        f"add its rule to {where}",
    )


def _check_config(family: Family, config: Any) -> None:
    """Refuse the options of a family whose computation no step describes."""
    for option, rule, step, harmless in family.refused:
        given = getattr(config, option, None)
        if given not in harmless:
            raise ModelError(f"{option}={given!r}", rule, step)


def _check_causal(family: Family, layouts: Sequence[Layout], module: nn.Module, config: Any) -> None:
    """Refuse an attention that looks at later tokens where the model makes causal masks: the mask is left out for a
    prompt alone and is there beside a padded one, so that its numbers would depend on its company."""
    if looks_ahead(config):
        return
    for number, (block, layout) in enumerate(zip(_blocks(module, family.blocks), layouts, strict=True)):
        path = next((step.path for step in layout.steps if step.kind == "attention"), "")
        if not getattr(block.get_submodule(path), "is_causal", True):
            raise ModelError(
                f"module {family.blocks}.{number}.{path} with is_causal False",
                f"attention looks at later tokens, but the masks of {family.name!r} are causal",
                "set is_causal in the model's configuration instead, which makes masks to match",
            )


def _first_uncovered(module: nn.Module) -> tuple[str, str]:
    """Path and class of the first leaf module that is neither linear nor known: the likeliest to need a rule."""
    leaves = [(path, type(part).__name__) for path, part in module.named_modules() if not any(part.children())]
    known = LINEAR | {*ACTIVATIONS} | {"LayerNorm"}
    return next((leaf for leaf in leaves if leaf[1] not in known and ROTARY not in leaf[1]), leaves[0])
