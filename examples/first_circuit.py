"""From a prompt to a circuit that was put to the test.

Which MLP neurons make a model say " are" after "The secretaries near the car"? The prompt is paired with "The
secretary near the car", so that only what differs between the two counts. Prints the strongest neurons, the
strongest ways through them, and how much of the answer they keep on sentences that they were not found on; writes
the graph's page.

Takes 10 seconds. Needs nothing but tracer: the demo model comes with it. For another model change `MODEL` (a
folder, a .gguf file or a Hugging Face id), and choose words that are one token in it.

    python examples/first_circuit.py
"""

from pathlib import Path

import tracer

MODEL = "demo"
PAGE = Path("runs/examples/first_circuit.html")


def pair(singular: str, plural: str, other: str) -> tracer.Prompt:
    """A sentence about several, and as its counterfactual the same about one."""
    text, counterfactual = f"The {plural} near the {other}", f"The {singular} near the {other}"
    return tracer.Prompt(text, target=" are", foil=" is", counterfactual=counterfactual)


def main() -> None:
    model = tracer.load(MODEL)
    circuit = tracer.trace(model, pair("secretary", "secretaries", "car"), nodes=200)

    # The metric is a difference of logits. RelP hands it down to the embeddings, and what is left over are roundings.
    print(f"logit of are minus is {circuit.metric:+.3f}, unexplained {circuit.unexplained:+.1e}")
    print(f"{circuit.n_nodes} nodes of {circuit.n_neurons} neurons, {circuit.n_edges} edges; the strongest:")
    for row in circuit.rows("neuron")[:5]:
        share = row["attribution"] / circuit.metric
        print(f"  L{row['layer']} N{row['neuron']:<4} at {row['token']:<6} {row['attribution']:+.3f} ({share:+.0%})")

    print("the strongest paths, from a token's embedding to a logit:")
    for path in circuit.paths(3):
        print(f"  {path}")

    # Attribution only ranks. Does the circuit hold? Everything outside it is set to its mean over the counterfactuals.
    nouns = [("key", "keys"), ("athlete", "athletes"), ("author", "authors"), ("child", "children"), ("box", "boxes")]
    others = [pair(*noun, other) for noun in nouns for other in ("cabinet", "table", "house")]
    found = tracer.evaluate(model, circuit, others, sizes=[1, 10, 50, 200])
    print(f"on {len(others)} other sentences, of {found.n_total:,} nodes:")
    for row in found.rows():
        interval = f"[{row['faithfulness_low']:.2f}, {row['faithfulness_high']:.2f}]"
        print(f"  {row['size']:3} alone keep {row['faithfulness']:.2f} {interval}, random ones {row['control']:+.2f}")

    PAGE.parent.mkdir(parents=True, exist_ok=True)
    tracer.view(circuit, PAGE)
    print(f"the graph's page: {PAGE}")


if __name__ == "__main__":
    main()
