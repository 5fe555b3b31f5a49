"""What neurons do: promoted tokens, exemplars, descriptions, supernodes, concepts.

Knows what a neuron's weights, its activations on text, and its attributions say of it, and how neurons are grouped by
that. A neuron is a (layer, neuron, polarity): the sign of its value decides what it promotes. Refuses to know how
attributions come about (attribution), what is drawn of it (reports), and runs over many prompts.

Door: `profiles.read`; `supernodes.supernodes` and its settings, `grouping.rows`, and `collapse.collapse`;
`descriptions.read`; `tokens.neuron_tokens`, `promoted` and `with_tokens`, whose product is `weights`; `known.read`,
what a run folder knows of a neuron, and `around.around`, what folders know of a graph's; `concepts` and `contrast`
(which neurons tell prompts apart), with the `labels` and the `separation` of columns that both share; `exemplars`
(`read`, `of_neuron`), with `densities` and `peaks` for whoever collects them, and `strongest` for the neurons of a run;
`describe`, a language model's descriptions (it is `tracer.describe`), with `endpoint.Endpoint`, `budget.Bounds`, and
`simulation.name_group` and `judge`; `exemplars.window`, what is shown of an exemplar.
"""
