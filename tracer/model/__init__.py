"""A Hugging Face model, its parts, the RelP rules, and every pass over it.

Knows nnsight (with `ndif`, the only room that does), which modules a family has and how each kind is linearised.
Refuses to know what a pass is for: methods, selection, circuits, files.

Door: `model.Model` and `load`, `named.model_of` for calls that take a name, `passes`;
`backend` for whoever runs models elsewhere, `sizes.Shape` for planners,
`state.undisturbed` for whoever computes, `registry.register_family`, `folder.out_of_memory`, and `experts`, `families`,
`head`, `interventions`, `rules` and `traces` for functions that travel to a server.
"""
