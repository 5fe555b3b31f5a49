"""Where a user's defaults are, and whether there are any: read for every verb, so that it imports nothing.

Knows the names of the file and of all variables TRACER_*. Refuses to know what they may say (cli/config.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tracer.cli import manner
from tracer.errors import JobError, TracerError

PREFIX = "TRACER_"
FILE = "tracer.toml"
CONFIG = "TRACER_CONFIG"
"""Names another file; empty: none."""
SECRETS = ("TRACER_LLM_KEY", "NDIF_API_KEY")
"""Variables whose values are never shown."""
ELSEWHERE = frozenset({CONFIG, "TRACER_LLM_URL", "TRACER_LLM_KEY", "TRACER_LLM_MODEL"})
"""Variables that are no defaults of options."""


def usual_file() -> Path:
    """The user's file, whether it is there or not: in XDG_CONFIG_HOME, or ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path("~/.config").expanduser()) / FILE


def config_file() -> Path | None:
    """The file that is read; None where there is none.

    Raises:
        JobError: TRACER_CONFIG names one that is not there.
    """
    named = os.environ.get(CONFIG)
    if named is None:
        usual = usual_file()
        return usual if usual.is_file() else None
    if named and not os.path.exists(named):
        raise JobError(f"{CONFIG}={named}", "is not there", "name a file, or unset it")
    return Path(named) if named else None


def there() -> bool:
    """Whether anything has to be read: where there is no file and no variable, nothing is imported."""
    path = config_file()
    set_here = any(name.upper().startswith(PREFIX) and name.upper() not in ELSEWHERE for name in os.environ)
    return set_here or (path is not None and str(path) != os.devnull)


def take(verbs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The defaults of each verb's options. What is wrong with them is kept for the verb to say, so that --help is there
    all the same."""
    import logging

    try:
        if not there():
            return {}
        from tracer.cli import config

        found = config.read()
        for one in found:
            if one.source is not None:
                logging.getLogger(manner.LOGGER).info("default %s=%s from %s", one.key, one.value, one.source)
        values = config.given(found)
        manner.now().fallback = config.fallback(values)
        return config.of_verbs(values, verbs)
    except TracerError as error:
        manner.now().problem = error
        return {}
