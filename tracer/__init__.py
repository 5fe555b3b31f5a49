"""tracer: find circuits of MLP neurons in language models, and prove what was found.

    model = tracer.load("demo")
    prompt = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")
    circuit = tracer.trace(model, prompt, nodes=100)

The names below are the whole public interface; they load on first use, so that importing tracer is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tracer.attributing import attribute as attribute
    from tracer.attribution import Attribution as Attribution
    from tracer.circuit import Circuit as Circuit
    from tracer.circuit import Graph as Graph
    from tracer.errors import JobError as JobError
    from tracer.errors import ModelError as ModelError
    from tracer.errors import RemoteError as RemoteError
    from tracer.errors import RunError as RunError
    from tracer.errors import TracerError as TracerError
    from tracer.evaluation import Evaluation as Evaluation
    from tracer.evaluation import evaluate as evaluate
    from tracer.evaluation import minimality as minimality
    from tracer.exchange import export as export
    from tracer.exchange import import_graph as import_graph
    from tracer.model import Model as Model
    from tracer.prompts import Prompt as Prompt
    from tracer.pruning import Pruning as Pruning
    from tracer.quality import estimate_quality as estimate_quality
    from tracer.remote import load as load
    from tracer.report import view as view
    from tracer.running import Run as Run
    from tracer.running import run as run
    from tracer.steering import Steering as Steering
    from tracer.steering import steer as steer
    from tracer.tracing import trace as trace

_HOME = {
    "Attribution": "attribution",
    "Circuit": "circuit",
    "Evaluation": "evaluation",
    "Graph": "circuit",
    "JobError": "errors",
    "Model": "model",
    "ModelError": "errors",
    "Prompt": "prompts",
    "Pruning": "pruning",
    "RemoteError": "errors",
    "Run": "running",
    "RunError": "errors",
    "TracerError": "errors",
    "Steering": "steering",
    "attribute": "attributing",
    "estimate_quality": "quality",
    "evaluate": "evaluation",
    "export": "exchange",
    "import_graph": "exchange",
    "load": "remote",
    "minimality": "evaluation",
    "run": "running",
    "steer": "steering",
    "trace": "tracing",
    "view": "report",
}
__all__ = [
    "Attribution",
    "Circuit",
    "Evaluation",
    "Graph",
    "JobError",
    "Model",
    "ModelError",
    "Prompt",
    "Pruning",
    "RemoteError",
    "Run",
    "RunError",
    "Steering",
    "TracerError",
    "attribute",
    "estimate_quality",
    "evaluate",
    "export",
    "import_graph",
    "load",
    "minimality",
    "run",
    "steer",
    "trace",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tracer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tracer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
