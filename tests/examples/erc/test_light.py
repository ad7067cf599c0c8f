import torch

from examples.erc.light import (
    CONTEXT,
    DialogueEncoder,
    DialogueRows,
    FeatureEncoder,
    FeatureRows,
    context_windows,
)

# A dialogue of 14 utterances, one of a single utterance, one of 3.
START = torch.tensor([0] * 14 + [14] + [15] * 3)
SPEAKERS = torch.tensor([0, 1, 0, 0, 1, 2, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0])


def rows(values: torch.Tensor) -> DialogueRows:
    return DialogueRows(values, SPEAKERS, context_windows(START))


def test_context_windows_end_with_the_row_and_stay_in_its_dialogue() -> None:
    windows = context_windows(START)
    assert windows.shape == (18, CONTEXT + 1)
    seen = [[row for row in window if row >= 0] for window in windows.tolist()]
    assert seen[0] == [0]
    assert seen[5] == [0, 1, 2, 3, 4, 5]
    assert seen[13] == list(range(13 - CONTEXT, 14))
    assert seen[14] == [14]
    assert seen[17] == [15, 16, 17]
    assert all(window[-1] == row for row, window in enumerate(windows.tolist()))


def test_dialogue_rows_mark_who_speaks_and_what_is_there() -> None:
    batch = rows(torch.arange(18.0)[:, None])[[5, 14, 16]]
    assert batch["values"].shape == (3, CONTEXT + 1, 1)
    assert batch["present"].sum(dim=1).tolist() == [6, 1, 2]
    assert batch["same_speaker"][0, -6:].tolist() == [0, 0, 0, 0, 0, 1]
    assert batch["same_speaker"][2].tolist() == [0] * (CONTEXT - 1) + [0, 1]
    assert batch["values"][0, -6:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_dialogue_encoder_sees_the_past_and_never_the_future() -> None:
    torch.manual_seed(0)
    encoder = DialogueEncoder(5, 3).eval()
    values = torch.randn(18, 5)
    before = encoder(**rows(values)[list(range(18))]).logits
    values[8] += 10.0
    after = encoder(**rows(values)[list(range(18))]).logits
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False] * 8 + [True] * 6 + [False] * 4


def test_dialogue_encoder_hears_who_speaks() -> None:
    torch.manual_seed(0)
    encoder = DialogueEncoder(5, 3).eval()
    batch = rows(torch.randn(18, 5))[[13]]
    other = {**batch, "same_speaker": 1 - batch["same_speaker"]}
    assert not torch.equal(encoder(**batch).logits, encoder(**other).logits)


def test_encoders_treat_rows_alone() -> None:
    torch.manual_seed(0)
    values = torch.randn(18, 5)
    for encoder, dataset in (
        (DialogueEncoder(5, 3).eval(), rows(values)),
        (FeatureEncoder(5, 3).eval(), FeatureRows(values)),
    ):
        together = encoder(**dataset[list(range(18))])
        alone = encoder(**dataset[[13]])
        torch.testing.assert_close(alone.features, together.features[13:14])
        torch.testing.assert_close(alone.logits, together.logits[13:14])
