"""The command line: verbs, their options, and how errors are shown.

Knows typer, and which public function a verb calls. Refuses to know how anything is computed.

Door: `main`.
"""

from __future__ import annotations


def main() -> None:
    """Run the command ``tracer``."""
    from tracer.cli.app import main as run

    run()
