"""Rows of a corpus that are not documents, as they are told: what the recipe asks for is news, the rest a warning."""

from collections.abc import Mapping

from pipeline.corpus.documents import ASKED_FOR
from pipeline.runtime import log
from pipeline.runtime.format import are, count_of


def tell_left_out(counts: Mapping[str, int], first_places: Mapping[str, str]) -> None:
    """Tell how many rows are left out, by reason, and where the first of each is.

    Args:
        counts: of the corpus, with keys `left out: reason`.
        first_places: by reason.
    """
    for reason, where in first_places.items():
        number = counts[f"left out: {reason}"]
        rows = f"{count_of(number, 'row')} {are(number)} left out"
        figures = {"rows": number, "reason": reason, "first": where}
        if reason in ASKED_FOR:
            log.info(f"{rows}, as the recipe asks: {reason}", **figures)
        else:
            log.warning(f"{rows}: {reason}; the first: {where}", **figures)
