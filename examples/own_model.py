"""A model of your own: a module in memory, with an activation that tracer has never seen.

tracer refuses what it has no rule for. `tracer.register_family` says where the parts of a block are and gives the rule
that is missing; `check_family` holds the family to the identities of the method on a tiny random model. The model here
has the demo's weights, so that its attributions must be the demo's.

Takes 15 seconds. Needs nothing but tracer. docs/families.md says more: norms of your own, and families in packages.

    python examples/own_model.py
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tracer
from tracer.testing import check_family

FOLDER = Path(tracer.__file__).parent / "demo/model"
PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")


class MyActivation(nn.Module):
    """z * sigmoid(z), as I write it."""

    def forward(self, z):
        return z / (1 + torch.exp(-z))


class MyConfig(LlamaConfig):
    model_type = "my_model"


class MyModel(LlamaForCausalLM):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.mlp.act_fn = MyActivation()


def family() -> tracer.Family:
    """Where the parts of a block are, in the order they run, and how they feed each other."""
    steps = {"input_layernorm": ["rms_norm"], "self_attn": ["attention"], "post_attention_layernorm": ["rms_norm"]}
    steps |= {"mlp.act_fn": ["activation", "gate"], "mlp.down_proj": ["product", "neurons"]}
    linear = {"value": "self_attn.v_proj", "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    norms = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}  # and none behind a branch
    weights = {name: tracer.Weight(path) for name, path in linear.items()}
    wiring = tracer.Wiring(**norms, attention_out=None, mlp_out=None, **weights)
    layout = tracer.Layout(tuple(tracer.Step(kind, path) for path, kinds in steps.items() for kind in kinds), wiring)
    final = tracer.Step("rms_norm", "model.norm")
    return tracer.Family("my_model", "model.embed_tokens", "model.layers", final, (layout,))


def main() -> None:
    model, tokenizer = MyModel.from_pretrained(FOLDER, dtype=torch.float32), AutoTokenizer.from_pretrained(FOLDER)
    try:
        tracer.load(model, tokenizer=tokenizer)
    except tracer.ModelError as error:
        print("before:", error)

    # The rule of an activation is act(z) / z, written without a division, so that it has its limit at 0.
    tracer.register_family(family(), activations={MyActivation: torch.sigmoid})
    AutoConfig.register("my_model", MyConfig)
    AutoModelForCausalLM.register(MyConfig, MyModel)
    report = check_family(MyConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4))
    print(report)
    report.require()

    mine = tracer.attribute(tracer.load(model, tokenizer=tokenizer), [PROMPT])
    demo = tracer.attribute(tracer.load("demo"), [PROMPT])
    apart = (mine.nodes - demo.nodes).abs().max() / demo.nodes.abs().max()
    print(f"metric {mine.metric.item():+.4f}, the demo's {demo.metric.item():+.4f}; attributions apart by {apart:.1e}")


if __name__ == "__main__":
    main()
