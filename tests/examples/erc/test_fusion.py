import pytest
import torch
from torch import Tensor, nn

from examples.erc.fusion import ConcatenationHead, FrozenFeatures, ShiftingHead
from examples.erc.recipe import FusionRecipe, Optimisation

RECIPE = FusionRecipe(
    optimisation=Optimisation(1e-3, 1, 4, 0.1, 0.01, 1.0, None),
    threshold=0.1,
    num_heads=3,
    dropout=0.2,
    attend_over="modalities",
)
WIDTHS = {"text": 6, "audio": 4, "visual": 5}
Head = type[ShiftingHead] | type[ConcatenationHead]


@pytest.fixture
def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        modality: torch.randn(7, width, generator=generator) for modality, width in WIDTHS.items()
    }


@pytest.mark.parametrize("head", [ShiftingHead, ConcatenationHead])
@pytest.mark.parametrize("students", [("audio",), ("visual",), ("audio", "visual")])
def test_heads_take_any_students(
    head: Head, students: tuple[str, ...], features: dict[str, Tensor]
) -> None:
    widths = {modality: WIDTHS[modality] for modality in ("text", *students)}
    model = head(widths, 3, RECIPE).eval()
    logits = model(**{modality: features[modality] for modality in widths}).logits
    assert logits.shape == (7, 3)
    alone = model(**{modality: features[modality][2:3] for modality in widths}).logits
    torch.testing.assert_close(alone, logits[2:3])


def test_shifting_head_is_the_library_s(features: dict[str, Tensor]) -> None:
    model = ShiftingHead(WIDTHS, 3, RECIPE).eval()
    expected = model.fusion(features["text"], features["audio"], features["visual"])
    swapped = {modality: features[modality] for modality in ("visual", "text", "audio")}
    assert torch.equal(model(**swapped).logits, expected)
    assert model.fusion.shift.threshold == 0.1
    assert model.fusion.dropout.p == model.fusion.attention_dropout.p == 0.2
    assert model.fusion.attention.num_heads == 3


def test_concatenation_head_is_norm_dropout_and_one_layer(features: dict[str, Tensor]) -> None:
    model = ConcatenationHead(WIDTHS, 3, RECIPE).eval()
    joined = torch.cat([features["text"], features["audio"], features["visual"]], dim=1)
    expected = nn.functional.layer_norm(joined, (15,)) @ model.classifier.weight.T
    torch.testing.assert_close(model(**features).logits, expected + model.classifier.bias)
    assert model.dropout.p == 0.2
    assert sum(p.numel() for p in model.parameters()) == 2 * 15 + 15 * 3 + 3


def test_frozen_features_keep_rows_together(features: dict[str, Tensor]) -> None:
    dataset = FrozenFeatures(features)
    assert len(dataset) == 7
    batch = dataset[[5, 0]]
    assert list(batch) == list(WIDTHS)
    assert all(torch.equal(batch[m], features[m][[5, 0]]) for m in WIDTHS)
