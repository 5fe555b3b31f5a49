"""Models on a server: its client, what travels there, and the probe that says what can be trusted.

Knows NDIF's protocol, limits, keys and permissions. Refuses to know circuits' files, runs and the command line.

Door: `probe.load` (it is `tracer.load`), `server.Server` and `Limits`, and the errors of `server`;
what any HTTP client of ours needs: `connection` (keys, addresses, bounded answers), `network` (deadlines), and
`parallel.OrderedMap`.
"""
