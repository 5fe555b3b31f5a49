"""Words and their opposites: asked in English, in Spanish, and in English by two shots.

Knows words that have one usual opposite; each is in one pair only, and a pair is train or test as a whole. Refuses to
know models beyond a tokenizer.
"""

from __future__ import annotations

from tracer.data.tasks.pairs import Item, Pair, drawn, of_split
from tracer.errors import JobError, quoted
from tracer.prompts import Vocabulary


def _words(table: str) -> tuple[tuple[str, str], ...]:
    one, two = (table.split()[part::2] for part in (0, 1))
    return tuple(zip(one, two, strict=True))


ENGLISH = _words("""
hot cold          big small         fast slow         good bad          tall short        rich poor
happy sad         light dark        hard soft         high low          wet dry           strong weak
full empty        open closed       clean dirty       early late        easy difficult    loud quiet
near far          thick thin        true false        wide narrow       alive dead        cheap expensive
deep shallow      smooth rough      up down           left right        in out            inside outside
before after      above below       front back        top bottom        first last        day night
black white       male female       love hate         war peace         life death        beginning end
win lose          buy sell          push pull         give take         come go           north south
east west         friend enemy      success failure   question answer   yes no            always never
more less         many few          all none          hello goodbye     positive negative public private
internal external import export     increase decrease accept reject     remember forget   arrive depart
ancient modern    guilty innocent   polite rude       kind cruel        safe dangerous    simple complex
maximum minimum   major minor       plus minus        entrance exit     victory defeat    heaven hell
ceiling floor     summer winter     asleep awake      tight loose       bright dim        expand contract
attack defend     create destroy    laugh cry         include exclude   legal illegal     possible impossible
visible invisible active passive    natural artificial rural urban      interesting boring beautiful ugly
wise foolish      everything nothing
""")
SPANISH = _words("""
grande pequeño      caliente frío       rápido lento        bueno malo          alto bajo
rico pobre          feliz triste        claro oscuro        duro blando         fuerte débil
lleno vacío         abierto cerrado     limpio sucio        fácil difícil       cerca lejos
verdadero falso     ancho estrecho      vivo muerto         barato caro         profundo superficial
largo corto         joven viejo         moderno antiguo     mojado seco         arriba abajo
izquierda derecha   dentro fuera        antes después       delante detrás      primero último
día noche           blanco negro        masculino femenino  amor odio           guerra paz
vida muerte         principio fin       ganar perder        comprar vender      subir bajar
entrar salir        norte sur           este oeste          amigo enemigo       éxito fracaso
pregunta respuesta  sí no               siempre nunca       más menos           todo nada
positivo negativo   público privado     interno externo     aumentar disminuir  aceptar rechazar
recordar olvidar    culpable inocente   simple complejo     máximo mínimo       mayor menor
victoria derrota    cielo infierno      verano invierno     dormido despierto   pesado ligero
bonito feo          inteligente tonto   posible imposible   legal ilegal        visible invisible
activo pasivo       natural artificial  rural urbano        dulce amargo        ruidoso silencioso
temprano tarde      sano enfermo        optimista pesimista interior exterior   superior inferior
verdad mentira      luz oscuridad       alegría tristeza    construir destruir  abrir cerrar
encender apagar     reír llorar         nacer morir         preguntar responder entrada salida
""")
SHOTS = ENGLISH[:2]
"""Shown before every word of the structure ``shots``, which never asks about them."""

_TEMPLATES = {
    "english": "The opposite of {word} is",
    "spanish": "El contrario de {word} es",
    "shots": "".join(f"{one}: {two}\n" for one, two in SHOTS) + "{word}:",
}
STRUCTURES = tuple(_TEMPLATES)


def items(structure: str, split: str) -> list[Item]:
    """The words of a split, both of every pair, each in its sentence. A third of the pairs are test.

    Raises:
        JobError: an unknown structure or split.
    """
    if structure not in _TEMPLATES:
        raise JobError(f"structure {quoted(structure)}", "is not known", f"use {', '.join(STRUCTURES)}")
    words = of_split(split, SPANISH if structure == "spanish" else ENGLISH, "opposites")
    chosen = [pair for pair in words if structure != "shots" or pair not in SHOTS]
    return [
        Item(word, _TEMPLATES[structure].format(word=word), f" {opposite}", {"word": word, "opposite": opposite})
        for pair in chosen
        for word, opposite in (pair, pair[::-1])
    ]


def pairs(structure: str, split: str, count: int, seed: int = 0, *, vocabulary: Vocabulary | None = None) -> list[Pair]:
    """`count` different pairs of words: the counterfactual asks for the opposite of another, which is the foil.

    Args:
        structure: ``english``, ``spanish`` or ``shots``.
        split: ``train`` or ``test``; both words of a pair are of the split.
        vocabulary: as of `pairs.drawn`.

    Raises:
        JobError: an unknown structure or split, or as `pairs.drawn`.
    """
    return drawn(f"opposites-{structure}", split, items(structure, split), count, seed, vocabulary)
