"""From prompts to circuits: attributions of all nodes, the nodes selected, the edges between them, their profiles.

Knows the methods, baselines, selection and pruning rules, and the replay that edges come from. Refuses to know files,
runs, the command line, and what ablating a circuit does (evaluation).

Door: `attribute.attribute`, `trace.trace` and `trace_all`, `among.links_among`, `edges.direct_edges`,
`profiles.attribution_profiles`, `of_logits.direction_of`, `targets`, `result.Attribution`, `selection`,
`pruning.Pruning`, `running.Running`; `request`, `reduce`, `graph`, `replay` and `exact` for whoever measures a server,
plans a run, or needs answers without their circuits.
"""
