"""Jobs over many prompts: planned, mapped over workers, committed unit by unit, finished.

Knows job files, workers and their deaths, and when a run is complete. Refuses to know the method: a unit of work calls
the public functions of `attribution` and `evaluation`.

Door: `driver.run`, `opened.Run` and `open_run`, `jobs.load_job`, `status`, `plan`, `finish`, `report`,
`pages` (report.html); Ray is in `workers.cluster` alone.
"""
