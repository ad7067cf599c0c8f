from collections.abc import Mapping

import numpy as np
import pytest

from examples.synthetic import face, voice
from examples.synthetic.acting import LEAST_INTENSITY, MISLEADING, deliver
from examples.synthetic.script import EMOTIONS


@pytest.mark.parametrize("similar", [face.SIMILAR, voice.SIMILAR], ids=["face", "voice"])
def test_every_emotion_is_taken_for_other_known_ones(
    similar: Mapping[str, tuple[str, ...]],
) -> None:
    assert set(similar) == set(EMOTIONS)
    for emotion, others in similar.items():
        assert others
        assert set(others) <= set(EMOTIONS) - {emotion}


def test_deliveries_mislead_now_and_then_and_vary_in_intensity() -> None:
    random = np.random.default_rng(0)
    deliveries = [deliver("fear", face.SIMILAR, random) for _ in range(4000)]
    assert {delivery.emotion for delivery in deliveries} == {"fear", *face.SIMILAR["fear"]}
    misled = np.mean([delivery.emotion != "fear" for delivery in deliveries])
    assert misled == pytest.approx(MISLEADING, abs=0.03)
    intensities = [delivery.intensity for delivery in deliveries]
    assert min(intensities) >= LEAST_INTENSITY
    assert max(intensities) <= 1.0
    assert np.mean(intensities) == pytest.approx((LEAST_INTENSITY + 1.0) / 2, abs=0.02)
