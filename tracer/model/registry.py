"""Families that are not in the package: registered by whoever has one, with the module classes that come with it.

    tracer.register_family(tracer.Family("mine", ...), norms={"rms_norm": [MyRMSNorm]})

A package that registers some is found by itself, in every process, where it names a function that does so as an entry
point of the group ``neuron_tracer.families``. Knows what a family must say to be of use, and that nothing known may be
said twice. Refuses to know single families; what a model must have of its family is families.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracer.errors import ModelError, quoted
from tracer.model import families, rules
from tracer.model.families import FAMILIES, Family, Layout

Named = str | type[nn.Module]
"""A class of modules, or its name."""
PARTS = ("all", "first half", "last half", "values", "values per head", "latent", "values of heads", "tail")
PATTERNS, NEURONS = ("attention", "delta"), ("neurons", "mixture")
"""Kinds of steps of which a block has one."""


def register_family(
    family: Family,
    *,
    norms: Mapping[str, Iterable[Named]] | None = None,
    activations: Mapping[Named, Callable[[Tensor], Tensor]] | None = None,
    linear: Iterable[Named] = (),
) -> Family:
    """Make models of a family known to everything in tracer, in this process.

    Check it with `tracer.testing.check_family` before you trust a number. Worker processes of a run find it where its
    package has an entry point of the group ``neuron_tracer.families``: a function without arguments that calls this.

    Args:
        family: where the parts are; its name is the configuration's `model_type`.
        norms: classes of norms that tracer does not know, by kind: ``rms_norm``, or ``layer_norm``, which centres.
        activations: of each class, its factor: a function of z that gives act(z) / z, with its limit at 0.
        linear: classes that are linear maps, or do nothing when they are not trained.

    Returns:
        The family. Registering the same again changes nothing.

    Raises:
        ModelError: another family has that name, a class is known as something else, or the family lacks something.
    """
    if not isinstance(family, Family):
        raise ModelError(f"family={quoted(family)}", "is not a tracer.Family", "make one: see docs/families.md")
    if FAMILIES.get(family.name, family) != family:
        rule = "is the name of a family that is known"
        raise ModelError(f"family {family.name!r}", rule, "name it by the model_type of your own configuration")
    classes = [(kind, _name(one)) for kind, some in (norms or {}).items() for one in some]
    factors = {_name(one): function for one, function in (activations or {}).items()}
    maps = {_name(one) for one in linear}
    for kind, name in classes:
        _check_class(name, f"norms={{{kind!r}: ...}}", families.NORM_CLASSES.get(kind))
    for name, function in factors.items():
        _check_class(name, "activations", {name} if rules.FACTORS.get(name) is function else set())
        _check_factor(name, function)
    for name in maps:
        _check_class(name, "linear", families.LINEAR)
    for layout in family.layouts:
        _check_layout(family.name, layout)
    for kind, name in classes:
        families.NORM_CLASSES[kind] |= {name}
    rules.FACTORS.update(factors)
    families.LINEAR |= maps
    return FAMILIES.setdefault(family.name, family)


def _name(one: Named) -> str:
    """A class by its name, which is how a module's rule is found."""
    if isinstance(one, str):
        return one
    if isinstance(one, type) and issubclass(one, nn.Module):
        return one.__name__
    raise ModelError(quoted(one), "is neither a class of modules nor the name of one", "give the class")


def _check_class(name: str, given: str, known: Any) -> None:
    """Refuse a class that has a rule already, but for the one (of the set `known`) that it is given."""
    if known is None:
        kinds = ", ".join(families.NORM_CLASSES)
        raise ModelError(given, "is no kind of norm", f"use one of {kinds}")
    has = [*families.NORM_CLASSES.values(), rules.ACTIVATIONS, families.LINEAR]
    if name not in known and any(name in some for some in has):
        step = "leave it out if that rule is right, or name your class otherwise"
        raise ModelError(f"class {name} in {given}", "has another rule already", step)


def _check_factor(name: str, factor: Callable[[Tensor], Tensor]) -> None:
    """Refuse a factor that is no number where its activation's input is 0, or large in half precision."""
    z = torch.tensor([0.0, -0.0, 1.0, -1.0, 60000.0, -60000.0])
    got = factor(z)
    if got.shape != z.shape or not bool(got.isfinite().all()):
        rule = f"gives {quoted(got.tolist())} at {z.tolist()}, where each must be a number"
        raise ModelError(f"the factor of {name}", rule, "write act(z) / z without a division, with its limit at 0")


def _check_layout(name: str, layout: Layout) -> None:
    """Refuse a layout that says less, or something else, than the rules and the replay of edges need."""
    value, kinds, wiring = f"a Layout of family {name!r}", [step.kind for step in layout.steps], layout.wiring
    if unknown := sorted({*kinds} - {*rules.RULE_OF, *NEURONS}):
        raise ModelError(value, f"has steps of unknown kind: {', '.join(unknown)}", f"use {', '.join(rules.RULE_OF)}")
    for some in (PATTERNS, NEURONS):
        if sum(kind in some for kind in kinds) != 1:
            rule = f"has {sum(kind in some for kind in kinds)} steps {some[0]!r}, one is needed"
            raise ModelError(value, rule, "name that module once")
    if (wiring.up is None) != (layout.experts is not None) or ("mixture" in kinds) != (layout.experts is not None):
        rule = "has neither a map `up` into its neurons nor experts with their step, or both"
        raise ModelError(value, rule, "give the wiring of an MLP, or Experts, the step 'mixture' and no gate and up")
    if layout.experts is None and ("product" in kinds) != (wiring.gate is not None):
        rule = "has a step 'product' without a gate in its wiring, or a gate without the step"
        raise ModelError(value, rule, "give both where the MLP multiplies act(gate) by up, else neither")
    if missing := sorted({*wiring.norms} - {step.path for step in layout.steps}):
        raise ModelError(value, f"has no step for the norms of its wiring: {', '.join(missing)}", "add a Step for each")
    used = (wiring.value, wiring.output, wiring.up, wiring.gate, wiring.latent)
    if other := [weight.part for weight in used if weight is not None and weight.part not in PARTS]:
        raise ModelError(value, f"reads a part {other[0]!r} of a map", f"use one of {', '.join(PARTS)}")
