"""The synthetic corpus as the input of the pipeline."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from examples.erc.raw import RawSource
from examples.erc.recipe import Optimisation
from examples.erc.source import Phase
from examples.synthetic import encoders
from examples.synthetic.script import Size

# Chosen on the dev split of the synthetic MELD.
_STAGE = Optimisation(
    learning_rate=1e-3,
    epochs=8,
    batch_size=8,
    warmup=0.1,
    weight_decay=0.01,
    max_gradient_norm=1.0,
    patience=None,
)

OPTIMISATION: dict[Phase, Optimisation] = {
    "teacher": replace(_STAGE, learning_rate=3e-3, epochs=10),
    "student": _STAGE,
    "fusion": _STAGE,
}


class SyntheticSource(RawSource):
    """Made-up clips in the published layout of a corpus, through tiny encoders.

    The corpus and its encoders are written on the spot, and kept.

    Args:
        name: The corpus whose layout it has, in lower case.
        title: The corpus as people write it.
        folder: Of the run; ``corpus`` and ``encoders`` go there.
        modalities: Those to use, text among them.
        seed: Of everything that is made up.
        size: How many utterances.
    """

    def __init__(
        self,
        name: str,
        title: str,
        folder: Path,
        modalities: tuple[str, ...],
        seed: int,
        size: Size | None = None,
    ) -> None:
        writer = import_module(f"examples.synthetic.{name}")
        root = writer.write(folder / "corpus", seed=seed, size=size or Size())
        corpus = import_module(f"examples.{name}.corpus").read(root)
        texts = [row.text for split in corpus.splits for row in corpus.utterances(split)]
        paths = encoders.write(folder / "encoders", texts, seed=seed)
        super().__init__(
            corpus,
            f"Synthetic {title}",
            encoders={modality: str(paths[modality]) for modality in modalities},
        )

    def optimisation(self, phase: Phase) -> Optimisation | None:
        """What suits the tiny encoders, which no recipe is about."""
        return OPTIMISATION[phase]
