"""tracer: find circuits of MLP neurons in language models, and prove what was found.

    model = tracer.load("demo")
    prompt = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")
    circuit = tracer.trace(model, prompt, nodes=100)

The names below are the whole public interface; they load on first use, so that importing tracer is instant. What takes
long or is tried again goes to the logger ``tracer``: logging.basicConfig(level="INFO") shows it.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from tracer.version import VERSION

__version__ = VERSION

logging.getLogger("tracer").addHandler(logging.NullHandler())  # silent unless the program that imports us listens

if TYPE_CHECKING:
    from tracer.attribution.attribute import attribute as attribute
    from tracer.attribution.of_logits import direction_of as direction_of
    from tracer.attribution.pruning import Pruning as Pruning
    from tracer.attribution.result import Attribution as Attribution
    from tracer.attribution.targets import direction as direction
    from tracer.attribution.trace import trace as trace
    from tracer.circuit.circuit import Circuit as Circuit
    from tracer.circuit.circuit import Graph as Graph
    from tracer.circuit.exchange import export as export
    from tracer.circuit.exchange import import_graph as import_graph
    from tracer.comparison.compare import Comparison as Comparison
    from tracer.comparison.compare import compare as compare
    from tracer.errors import JobError as JobError
    from tracer.errors import ModelError as ModelError
    from tracer.errors import RemoteError as RemoteError
    from tracer.errors import RunError as RunError
    from tracer.errors import TracerError as TracerError
    from tracer.errors import TracerWarning as TracerWarning
    from tracer.evaluation.answers import filter_prompts as filter_prompts
    from tracer.evaluation.answers import rollout as rollout
    from tracer.evaluation.curves import Evaluation as Evaluation
    from tracer.evaluation.edge_curves import EdgeCurves as EdgeCurves
    from tracer.evaluation.edge_curves import edge_curves as edge_curves
    from tracer.evaluation.faithfulness import evaluate as evaluate
    from tracer.evaluation.faithfulness import minimality as minimality
    from tracer.evaluation.knockouts import Knockouts as Knockouts
    from tracer.evaluation.knockouts import knockouts as knockouts
    from tracer.evaluation.quality import always_on as always_on
    from tracer.evaluation.quality import estimate_quality as estimate_quality
    from tracer.evaluation.steering import Steering as Steering
    from tracer.evaluation.steering import steer as steer
    from tracer.evaluation.swap import Swap as Swap
    from tracer.evaluation.swap import swap as swap
    from tracer.evaluation.sweep import Sweep as Sweep
    from tracer.evaluation.sweep import sweep as sweep
    from tracer.meaning.concepts import Concepts as Concepts
    from tracer.meaning.concepts import concepts as concepts
    from tracer.meaning.contrast import contrast as contrast
    from tracer.meaning.describe import describe as describe
    from tracer.meaning.supernodes import supernodes as supernodes
    from tracer.meaning.tokens import NeuronTokens as NeuronTokens
    from tracer.meaning.tokens import neuron_tokens as neuron_tokens
    from tracer.meaning.tokens import promoted as promoted
    from tracer.meaning.tokens import with_tokens as with_tokens
    from tracer.model.families import Family as Family
    from tracer.model.families import Layout as Layout
    from tracer.model.families import Step as Step
    from tracer.model.families import Weight as Weight
    from tracer.model.families import Wiring as Wiring
    from tracer.model.model import Model as Model
    from tracer.model.registry import register_family as register_family
    from tracer.ndif.probe import load as load
    from tracer.ndif.server import Limits as Limits
    from tracer.prompts import Prompt as Prompt
    from tracer.reports.tables import view as view
    from tracer.runs.driver import run as run
    from tracer.runs.opened import Run as Run
    from tracer.runs.opened import open_run as open_run
    from tracer.runs.plan.local import plan as plan

_HOME = {
    "Attribution": "attribution.result",
    "Circuit": "circuit.circuit",
    "Comparison": "comparison.compare",
    "Concepts": "meaning.concepts",
    "EdgeCurves": "evaluation.edge_curves",
    "Evaluation": "evaluation.curves",
    "Family": "model.families",
    "Graph": "circuit.circuit",
    "JobError": "errors",
    "Knockouts": "evaluation.knockouts",
    "Layout": "model.families",
    "Limits": "ndif.server",
    "Model": "model.model",
    "ModelError": "errors",
    "NeuronTokens": "meaning.tokens",
    "Prompt": "prompts",
    "Pruning": "attribution.pruning",
    "RemoteError": "errors",
    "Run": "runs.opened",
    "RunError": "errors",
    "Step": "model.families",
    "TracerError": "errors",
    "TracerWarning": "errors",
    "Steering": "evaluation.steering",
    "Swap": "evaluation.swap",
    "Sweep": "evaluation.sweep",
    "Weight": "model.families",
    "Wiring": "model.families",
    "always_on": "evaluation.quality",
    "attribute": "attribution.attribute",
    "compare": "comparison.compare",
    "concepts": "meaning.concepts",
    "contrast": "meaning.contrast",
    "describe": "meaning.describe",
    "direction": "attribution.targets",
    "direction_of": "attribution.of_logits",
    "edge_curves": "evaluation.edge_curves",
    "estimate_quality": "evaluation.quality",
    "evaluate": "evaluation.faithfulness",
    "export": "circuit.exchange",
    "filter_prompts": "evaluation.answers",
    "import_graph": "circuit.exchange",
    "knockouts": "evaluation.knockouts",
    "load": "ndif.probe",
    "minimality": "evaluation.faithfulness",
    "neuron_tokens": "meaning.tokens",
    "open_run": "runs.opened",
    "plan": "runs.plan.local",
    "promoted": "meaning.tokens",
    "register_family": "model.registry",
    "rollout": "evaluation.answers",
    "run": "runs.driver",
    "steer": "evaluation.steering",
    "supernodes": "meaning.supernodes",
    "swap": "evaluation.swap",
    "sweep": "evaluation.sweep",
    "trace": "attribution.trace",
    "view": "reports.tables",
    "with_tokens": "meaning.tokens",
}
__all__ = [
    "Attribution",
    "Circuit",
    "Comparison",
    "Concepts",
    "EdgeCurves",
    "Evaluation",
    "Family",
    "Graph",
    "JobError",
    "Knockouts",
    "Layout",
    "Limits",
    "Model",
    "ModelError",
    "NeuronTokens",
    "Prompt",
    "Pruning",
    "RemoteError",
    "Run",
    "RunError",
    "Steering",
    "Step",
    "Swap",
    "Sweep",
    "TracerError",
    "TracerWarning",
    "Weight",
    "Wiring",
    "always_on",
    "attribute",
    "compare",
    "concepts",
    "contrast",
    "describe",
    "direction",
    "direction_of",
    "edge_curves",
    "estimate_quality",
    "evaluate",
    "export",
    "filter_prompts",
    "import_graph",
    "knockouts",
    "load",
    "minimality",
    "neuron_tokens",
    "open_run",
    "plan",
    "promoted",
    "register_family",
    "rollout",
    "run",
    "steer",
    "supernodes",
    "swap",
    "sweep",
    "trace",
    "view",
    "with_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tracer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tracer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
