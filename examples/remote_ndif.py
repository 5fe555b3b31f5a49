"""A model that you cannot hold: trace, test and steer it on an NDIF server, without its weights here.

What is sent is the trace, as source text; what comes back is the circuit, not the activations. A saved circuit knows
the model's fingerprint, so that it can be evaluated later, there or here.

Takes seconds on a small model; a public server's queue decides. Needs a server: set NDIF_API_KEY for the public one at
ndif.us, or NDIF_HOST for another (docs/ndif.md hosts one on your machine), and name a model that it serves.

    NDIF_API_KEY=... python examples/remote_ndif.py meta-llama/Llama-3.1-8B
"""

import logging
import os
import sys
from pathlib import Path

import tracer

NAME = sys.argv[1] if len(sys.argv) > 1 else "meta-llama/Llama-3.1-8B"
FOLDER = Path("runs/examples/remote")


def main() -> None:
    if not os.environ.get("NDIF_API_KEY") and not os.environ.get("NDIF_HOST"):
        raise SystemExit("needs a server: set NDIF_API_KEY for ndif.us, or NDIF_HOST=http://... for your own")
    logging.basicConfig(format="%(message)s")  # what is tried again is said

    # Here only its configuration and tokenizer are loaded. The server is probed first: its versions, whether the key
    # may take gradients, and whether a gradient is right. `Limits` bounds waiting; `report` prints a job's state.
    model = tracer.load(
        NAME, remote=True, limits=tracer.Limits(wait=600.0), report=lambda line: print(line, file=sys.stderr)
    )

    prompt = tracer.Prompt(
        "The keys near the cabinet", target=" are", foil=" is", counterfactual="The key near the cabinet"
    )
    circuit = tracer.trace(model, prompt, nodes=100)  # one request: attribution, selection and edges
    print(
        f"logit of are minus is {circuit.metric:+.3f}; {circuit.n_nodes} nodes, {circuit.n_edges} edges; the strongest:"
    )
    for row in circuit.rows("neuron")[:3]:
        print(f"  L{row['layer']} N{row['neuron']:<5} at {row['token']:<9} {row['attribution']:+.3f}")
    circuit.save(FOLDER, overwrite=True)

    # Tested there: everything outside the circuit takes its value on the counterfactual. Only sets of nodes are sent.
    found = tracer.evaluate(model, tracer.Circuit.load(FOLDER), sizes=[10, 100])
    for row in found.rows():
        print(
            f"  the {row['size']:3} strongest alone keep {row['faithfulness']:.2f}, random ones {row['control']:+.2f}"
        )

    steered = tracer.steer(model, circuit, prompt, factor=-1, top=20, random=2, max_new_tokens=1)
    print(f"with the 20 strongest turned around it says{steered.after!r} instead of{steered.before!r}")


if __name__ == "__main__":
    main()
