"""Opposites in nine languages: six words, each with its opposite among them, in a sentence of each language.

Knows the words and sentences, and their split. Refuses to know models.
"""

from __future__ import annotations

from tracer.data.tasks.questions import Question, drawn, part

AXES = {"size": ("big", "small"), "temperature": ("hot", "cold"), "speed": ("fast", "slow")}
"""The two words of each axis, in English: the names of the words in every language."""

LANGUAGES: dict[str, tuple[str, str]] = {
    "English": ('The opposite of "{word}" is "', "big small hot cold fast slow"),
    "Spanish": ('Lo contrario de "{word}" es "', "grande pequeño caliente frío rápido lento"),
    "French": ('Le contraire de "{word}" est "', "grand petit chaud froid rapide lent"),
    "German": ('Das Gegenteil von "{word}" ist "', "groß klein heiß kalt schnell langsam"),
    "Italian": ('Il contrario di "{word}" è "', "grande piccolo caldo freddo veloce lento"),
    "Portuguese": ('O contrário de "{word}" é "', "grande pequeno quente frio rápido lento"),
    "Russian": (
        'Слово, противоположное слову "{word}", — это "',
        "большой маленький горячий холодный быстрый медленный",
    ),
    "Chinese": ('"{word}"的反义词是"', "大 小 热 冷 快 慢"),
    "Japanese": ('"{word}"の反対は"', "大きい 小さい 熱い 冷たい 速い 遅い"),
}
"""Of each language the sentence, and its words in the order of `AXES`."""


def questions(split: str, count: int, seed: int = 0) -> list[Question]:
    """`count` of the 54 questions, as many of each language as there can be; the target is the opposite.

    Labels: ``language``, ``axis``, and ``word``, the word that is asked about, in English.

    Args:
        split: ``all``, or ``train`` or ``test`` (a third): both words of an axis in a language are on one side.

    Raises:
        JobError: an unknown split, or more than there are.
    """
    groups = [(language, axis) for language in LANGUAGES for axis in AXES]
    made = [one for language, axis in part(split, groups, "antonyms") for one in _both(language, axis)]
    return drawn("antonyms", split, made, count, seed, by="language")


def _both(language: str, axis: str) -> list[Question]:
    sentence, table = LANGUAGES[language]
    known = dict(zip((word for both in AXES.values() for word in both), table.split(), strict=True))
    one, other = AXES[axis]
    return [
        Question(
            sentence.format(word=known[word]),
            known[opposite],
            {"language": language, "axis": axis, "word": word},
        )
        for word, opposite in ((one, other), (other, one))
    ]
