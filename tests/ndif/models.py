"""Save tiny models of two more families into a folder, for a server to load: python tests/ndif/models.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import tiny as t

FAMILIES = ("gemma2", "gpt2", "qwen3_moe")  # as in loopback.py
for family in FAMILIES:
    t.save(t.tiny(family, n_layers=2), Path(sys.argv[1]) / family)
