"""What differs: the circuits of two models, checkpoints, adapters or sets of prompts beside each other, node by node.

Knows how nodes and prompts of several sides are matched, what of their attributions appeared, vanished or changed, how
sure that is, and how a neuron fares over checkpoints. Refuses to know how circuits are traced, how a list of
checkpoints is run (runs/revisions.py), and how a comparison is shown (reports).

Door: `compare.compare`, `compare.Comparison`; for runs and the command line `compare.compared`, `sides.of_run` and
`sides.of_model`, `differences.Design`; for pages `aligned`.
"""
