"""Texts that the tests of the steps share: real English, and made-up words whose every count is known."""

from pydoc_data.topics import topics

SYLLABLES = ("ba", "ke", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu")


def made_up(count: int, start: int = 0) -> list[str]:
    """`count` different words of six letters; none of them repeats for other starts below 15³."""
    n = len(SYLLABLES)
    numbers = range(start, start + count)
    return [SYLLABLES[k % n] + SYLLABLES[k // n % n] + SYLLABLES[k // n // n] for k in numbers]


def lines(count: int, words: int, end: str = ".", begin: str = "", start: int = 0) -> str:
    """`count` lines of `words` made-up words each."""
    return "\n".join(begin + " ".join(made_up(words, start + i * words)) + end for i in range(count))


def prose() -> list[str]:
    """English that every Python carries: 40 of its help texts, 70 kB."""
    return [text[:4000] for _, text in sorted(topics.items())[:40]]
