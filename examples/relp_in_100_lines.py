"""RelP in 100 lines of plain PyTorch: which MLP neurons of a Llama write the next token, and do they suffice?

Nothing of tracer is imported. A Llama's forward pass is written out with RelP's four rules, `.detach()`s that leave the
values as they are (docs/method.md, section 3). One backward pass attributes the metric to every neuron (input of a down
projection); what the embeddings get of it must add up to it. Takes 8 seconds; needs torch, transformers and a Llama,
without arguments the demo model of this repository.

    python examples/relp_in_100_lines.py [FOLDER_OR_ID "PROMPT" "TARGET" "FOIL"]
"""

import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

DEMO = [str(Path(__file__).parents[1] / "tracer/demo/model"), "The secretaries near the car", " are", " is"]


def norm(module, x):
    """Rule 1: RMSNorm, whose statistic is a constant."""
    return x * (module.weight * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)).detach()


def attention(module, x, rotary):
    """Rule 2: the pattern is a constant; relevance flows through values and the output projection alone."""
    query, key, value = (
        part(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)  # [batch, head, position, head_dim]
        for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    later = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    pattern = (query @ key.transpose(-1, -2) * module.scaling + later).softmax(-1).detach()
    return module.o_proj((pattern @ value).transpose(1, 2).flatten(-2))


def neurons(module, x):
    """Rule 3: silu(z) = z * sigmoid(z), whose sigmoid is a constant. Rule 4: each factor gets half of the gradient."""
    z, up = module.gate_proj(x), module.up_proj(x)
    gate = z * torch.sigmoid(z).detach()
    return (gate.detach() * up + gate * up.detach()) / 2


def forward(model, embeddings):
    """Logits of the last position [batch, token] and every layer's neurons [batch, position, neuron]."""
    x, acts = embeddings, []
    rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    for block in model.model.layers:
        x = x + attention(block.self_attn, norm(block.input_layernorm, x), rotary)
        acts.append(neurons(block.mlp, norm(block.post_attention_layernorm, x)))
        x = x + block.mlp.down_proj(acts[-1])
    return linear(norm(model.model.norm, x[:, -1]), model.lm_head.weight), acts


def relp(model, ids, target, foil):
    """The metric (logit of `target` minus that of `foil`), and what neurons [layer, position, neuron] and embeddings
    [position] have of it: value times the gradient of the linearised model, in logits."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits, acts = forward(model, embeddings)
    torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)  # else it is no plain Llama
    metric = logits[0, target] - logits[0, foil]
    values = [*acts, embeddings]
    *nodes, entry = [v * g for v, g in zip(values, torch.autograd.grad(metric, values), strict=True)]
    return metric.detach(), torch.cat(nodes).detach(), entry[0].sum(-1).detach()


def ablated(model, ids, target, foil, keep):
    """The metric of the model itself where neurons outside `keep` [layer, position, neuron] are 0."""
    with torch.no_grad(), ExitStack() as hooks:
        for block, kept in zip(model.model.layers, keep, strict=True):
            before = block.mlp.down_proj.register_forward_pre_hook
            hooks.enter_context(before(lambda _, args, kept=kept: (args[0] * kept,)))
        logits = model(ids).logits[0, -1]
    return logits[target] - logits[foil]


def main(folder, text, target, foil):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    (target,), (foil,) = (tokenizer.encode(word, add_special_tokens=False) for word in (target, foil))  # one token each
    metric, nodes, embeddings = relp(model, ids, target, foil)
    torch.testing.assert_close(embeddings.sum(), metric, rtol=1e-3, atol=1e-3)  # fails where linear maps have biases
    print(f"metric {metric:+.4f} logits, of the embeddings {embeddings.sum():+.4f}: relevance is conserved")
    order = nodes.flatten().abs().argsort(descending=True)  # strongest first
    for layer, position, neuron in zip(*torch.unravel_index(order[:5], nodes.shape), strict=True):
        print(f"L{layer} N{neuron:<4} at {tokenizer.decode(ids[0, position])!r} {nodes[layer, position, neuron]:+.4f}")
    empty = ablated(model, ids, target, foil, torch.zeros_like(nodes))
    for size in (1, 3, 10, 100, nodes.numel()):
        keep = torch.zeros(nodes.numel()).index_fill(0, order[:size], 1).view_as(nodes)
        left = (ablated(model, ids, target, foil, keep) - empty) / (metric - empty)
        print(f"{size:5} of {nodes.numel():,} neurons alone keep {left:.2f} of the metric")


if __name__ == "__main__":
    main(*(sys.argv[1:] or DEMO))
