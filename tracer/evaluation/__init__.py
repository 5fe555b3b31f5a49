"""Does it hold: ablations, faithfulness and completeness, agreement with exact effects, steering.

Knows which nodes are ablated to what, here or on a server, and the statistics of the answers. Refuses to know how
nodes were found, how figures are drawn (reports), and runs over many prompts.

Door: `faithfulness.evaluate` and `minimality`, `edge_curves.edge_curves`, `knockouts.knockouts`,
`quality.estimate_quality` and `always_on`, `steering.steer` and its `texts`, `sweep` with its `groups` and `responses`,
`swap.swap`, `answers.filter_prompts`; `testset`, `curves` and `statistics` for reports and runs.
"""
