"""Who does the work: messages, the scheduler, processes of this machine, actors of a Ray cluster.

Knows processes, pipes, deaths and time-outs. Refuses to know what a unit of work computes.
"""
