"""What a run says when it ends, and what is there before that: report.html, and the graph pages that it links to.

Knows what a run's folder holds, and puts it into words, tables and drawings. Refuses to compute what the folder does
not hold, to load a model, and to know how a page looks (reports).

Door: `write.write_report`, `write.report_text`; `benchmark.files` are what a benchmark draws and averages beside it.
"""
