"""What a person reads: terminal tables, figures, the HTML report, the graph page.

Knows rich, matplotlib, jinja and the page's JavaScript. Refuses to compute anything that a circuit, an evaluation or a
run does not hold.

Door: `tables`, `neurons`, `swaps`, `supernodes` and `concepts` (terminal), `sweeps` (terminal, heat map and page),
`comparison` (terminal, files and pages),
`document` (one circuit as HTML), `page` (any report as HTML) with the words of `verdict`, `figures`, `viewer` with its
`facts`, which `served` serves; `parts` says what a table is, `sheet` has the rows that all show, `folded` draws them in
the width of a terminal, `meanings` what the graph page says of neurons. `tables.view` is `tracer.view`; `notebook`,
with `cards` and `plots`, is how results show themselves, and is found by name.
"""
