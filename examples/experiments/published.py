"""Published figures: weighted F1 on test in percent, each with its source.

The text of the TelME paper was not at hand. A figure stands here only if two public listings agree
on it; what is known of the paper's other tables at second hand, from a single summary, is left out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """What is published of a system on a corpus.

    Attributes:
        system: Its name for people.
        weighted_f1: A fraction in [0, 1].
        source: Where it stands.
    """

    system: str
    weighted_f1: float
    source: str


_TELME = "Yun et al., NAACL 2024, Table 2; listed by hyper.ai and Papers with Code"
_EMOCAPS = "Li et al., Findings of ACL 2022; listed by hyper.ai and Papers with Code"

PUBLISHED = {
    "meld": (
        Published("EmoCaps, as published", 0.6400, _EMOCAPS),
        Published("TelME, as published", 0.6737, _TELME),
    ),
    "iemocap": (
        Published("EmoCaps, as published", 0.7177, _EMOCAPS),
        Published("TelME, as published", 0.7048, _TELME),
    ),
}
"""By corpus, in the order of the table."""
