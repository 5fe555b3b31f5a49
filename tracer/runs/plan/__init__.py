"""What a run needs before it starts: memory, batches, workers, disk.

Knows the arithmetic of sizes and this machine's limits. Refuses to load weights.
"""
