from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from examples.erc.pipeline import run
from examples.erc.recipe import Recipe
from examples.erc.results import read
from examples.erc.training import Hardware
from examples.synthetic.script import Size
from examples.synthetic.source import SyntheticSource

SIZE = Size(train=9, dev=4, test=4)


def brief(source: SyntheticSource, name: str) -> Recipe:
    """The released recipe with the optimisation of the tiny encoders, cut to one epoch."""
    recipe: Recipe = import_module(f"examples.{name}.recipes").RELEASED
    stages = {}
    for phase in ("teacher", "student", "fusion"):
        own = source.optimisation(phase)  # type: ignore[arg-type]
        assert own is not None
        stages[phase] = replace(getattr(recipe, phase), optimisation=replace(own, epochs=1))
    return replace(recipe, **stages)


@pytest.mark.parametrize(("name", "title"), [("meld", "MELD"), ("iemocap", "IEMOCAP")])
def test_the_whole_story_runs_from_clips_to_results(name: str, title: str, tmp_path: Path) -> None:
    def tell() -> dict[str, object]:
        modalities = ("text", "audio", "visual")
        source = SyntheticSource(name, title, tmp_path, modalities, seed=0, size=SIZE)
        recipe = brief(source, name)
        return dict(run(source, recipe, (0,), tmp_path, Hardware("cpu"), "a test"))

    first = tell()
    checked = read(first)
    assert checked.title == f"Synthetic {title}"
    assert len(checked.systems) == 17
    assert checked.counts == {"train": 9, "dev": 4, "test": 4}
    assert tell() == first  # every stage was kept: times are the same too
