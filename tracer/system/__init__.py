"""What lies under everything: this machine, its processes and files, and JSON that came from outside.

Refuses to know what a file means, and all of tracer but its errors.

Door: `machine`, `forks`, `wholefile`, `jsontext`, `display` (how results show themselves), `bars` (progress).
"""
