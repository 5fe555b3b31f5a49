"""What one unit of a run is: a shard of prompts, or a combination of the benchmark.

Knows which public functions a unit calls and what it writes. Refuses to know who runs it.
"""
