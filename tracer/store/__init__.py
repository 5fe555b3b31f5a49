"""What is on disk: run folders, Parquet tables, object stores.

Knows schemas, hashes, locks, commits and how tables are read, sorted and summed. Refuses to know models, prompts as
text, and why a row was written.

Door: `run_folder.RunFolder` and `Commit`, `one_prompt`, `storage`, `parquet`, `schemas`, `file.File`; `aggregation`,
`edge_means`, `compaction`, `columns`, `query` for whoever finishes or reads a run. What a record must hold is in
`record`, which `run_folder` alone asks, and the kinds there are (`MANY`).
"""
