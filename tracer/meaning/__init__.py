"""What neurons do: promoted tokens, exemplars, descriptions, supernodes, concepts.

Knows what a neuron's weights, its activations on text, and its attributions say of it, and how neurons are grouped by
that. A neuron is a (layer, neuron, polarity): the sign of its value decides what it promotes. Refuses to know how
attributions come about (attribution), what is drawn of it (reports), and runs over many prompts.

<<<<<<< HEAD
Door:
`descriptions.read`;
exemplars (`read`, `of_neuron`);
`describe`, a language model's descriptions (it is `tracer.describe`), with `endpoint.Endpoint`, `budget.Bounds`, and
`simulation.name_group` and `judge`.
"""
