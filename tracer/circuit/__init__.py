"""The result: the graph and circuit of one prompt, and the formats of other tools.

Knows what a circuit holds, how it is saved, and Neuronpedia's, MIB's and GraphML's forms of it. Refuses to know models,
how attributions are computed, and how a circuit is drawn (reports).

Door: `circuit.Circuit`, `Traced` and `Graph`, `exchange.export` and `import_graph`, `from_run.read_graph`, the file of
named groups, `supernodes_file`, which `notes` keeps for a run, `said.Said`, what neurons are called, and `names`, what
nodes are. Inside, `neuronpedia` is that format and `foreign` the forms in which its writers name nodes.
"""
