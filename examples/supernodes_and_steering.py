"""Supernodes: neurons that answer to the same tokens and push the same answers; and what turning them around does.

The demo answers "the capital of the state containing Dallas is" in two hops: city to state, state to capital. The
circuit's neurons are grouped by their attribution profiles, and each group's values are multiplied by -1 and by 0,
beside random neurons: as many in each layer at the same positions.

Takes 15 seconds. Needs nothing but tracer.

    python examples/supernodes_and_steering.py
"""

from collections import Counter

import tracer

TEXT, ANSWER = "the capital of the state containing Dallas is", " Austin"


def main() -> None:
    model = tracer.load("demo")

    # As in the paper: the sum of the five largest logits. Neurons are compared by their profiles: what each token does
    # to a neuron, and what it does to each logit.
    circuit = tracer.trace(model, tracer.Prompt(TEXT), metric="topk", profiles=True, nodes=60)
    circuit = tracer.with_tokens(model, circuit)  # what neurons promote, which groups are named by
    found = tracer.supernodes(circuit, clusters=4, method="agglomerative", tokens=circuit.neuron_tokens)

    nodes = circuit.nodes.to_pylist()
    groups = {group.name: found.graph.groups[group.name] for group in found.file.groups}
    print(f"{circuit.n_nodes} nodes in {len(groups)} supernodes:")
    for name, members in groups.items():
        total = sum(nodes[node]["attribution"] for node in members)
        places = Counter(nodes[node]["token"].strip() for node in members)
        where = ", ".join(f"{number} at {token}" for token, number in places.most_common(2))
        print(f"  {name:<24} {total:+6.2f} logits, {len(members)} nodes: {where}")

    # `found.graph` is the circuit with its groups. The sweep multiplies each on the prompt; 20 random draws beside it.
    asked = [tracer.Prompt(TEXT, target=ANSWER)]
    swept = tracer.sweep(model, found.graph, asked, factors=[-1, 0], random=20)
    print(f"p({ANSWER}) when a group's values are multiplied:")
    for one in swept.responses():
        if one.role == "target":
            change, control = one.change.estimate.item(), one.control.estimate.item()
            print(f"  {one.group:<24} x {one.factor:+.0f}: {one.before:.2f} {change:+.2f}, random {control:+.2f}")

    # What is said instead, with the strongest group turned around at its own positions.
    strongest = found.rows()[0].name
    members = [(nodes[n]["layer"], nodes[n]["position"], nodes[n]["neuron"]) for n in groups[strongest]]
    steered = tracer.steer(model, members, asked[0], factor=-1, max_new_tokens=3)
    print(f"with {strongest} turned around:{steered.steered.text!r} instead of{steered.unsteered.text!r}")


if __name__ == "__main__":
    main()
