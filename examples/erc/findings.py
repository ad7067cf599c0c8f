"""Sentences that say what the tables show, whether it flatters the method or not."""

from examples.erc.comparison import (
    Difference,
    Spread,
    concatenated,
    difference,
    spread,
    weighted_f1,
    words,
)
from examples.erc.results import Results, System


def findings(results: Results) -> list[str]:
    """Sum the results up in sentences.

    Args:
        results: What was run; comparisons that lack a side are left out.

    Returns:
        One or more sentences, the most important first; the figures are weighted F1 on test, in
        percent.
    """
    sentences = _level(results)
    for left, right in _comparisons(results):
        gap = difference(left, right) if left else None
        if left and right and gap:
            sentences.append(_compared(_called(left, results), _called(right, results), gap))
    return sentences + _blind_spots(results)


def _called(system: System, results: Results) -> str:
    return "TelME" if system == results.method else f"“{system.title}”"


def _level(results: Results) -> list[str]:
    """Where TelME stands, and which system stands highest."""
    scores = {system.key: spread(system.runs, weighted_f1) for system in results.systems}
    best = max(results.systems, key=lambda system: scores[system.key].mean)
    shown = results.method or best
    name = f"TelME (“{shown.title}”)" if shown == results.method else f"“{shown.title}”"
    sentences = [f"{name} reaches a weighted F1 of {words(scores[shown.key])}."]
    many = len(results.systems)
    if best != shown:
        sentences.append(
            f"The highest mean of the {many} systems is that of “{best.title}”: "
            f"{words(scores[best.key])}."
        )
    elif many > 1:
        sentences.append(f"None of the {many} systems has a higher mean.")
    return sentences


def _comparisons(results: Results) -> list[tuple[System | None, System | None]]:
    method = results.method
    return [
        (method, results.teacher),
        (results.plain, results.teacher),
        (method, concatenated(results, method) if method else None),
        (method, results.untaught(method) if method else None),
        *(
            (system, results.untaught(system))
            for system in results.group("student")
            if system.distillation == "response+feature"
        ),
    ]


def _compared(left: str, right: str, gap: Difference) -> str:
    seeds = "on one seed" if gap.count == 1 else f"over {gap.count} seeds"
    if gap.mean == 0:
        return f"{left} is level with {right} {seeds}."
    side = "ahead of" if gap.mean > 0 else "behind"
    size = words(Spread(abs(gap.mean), gap.deviation, gap.count))
    verdict = "" if gap.deviation is None else f", {gap.verdict}"
    return f"{left} is {side} {right} by {size} points {seeds}{verdict}."


def _blind_spots(results: Results) -> list[str]:
    """Classes that some system never gets right."""
    sentences = []
    many = len(results.systems)
    for index, label in enumerate(results.labels):
        blind = sum(
            all(run.per_class_f1[index] == 0 for run in system.runs) for system in results.systems
        )
        if blind:
            have = "has" if blind == 1 else "have"
            sentences.append(
                f"{blind} of {many} systems {have} an F1 of zero for {label} in every run."
            )
    return sentences
