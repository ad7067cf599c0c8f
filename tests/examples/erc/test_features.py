from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.erc.errors import InputError
from examples.erc.feature_encoding import LARGEST
from examples.erc.features import FeatureSource
from examples.erc.source import SPLITS, EncoderOutput

Write = Callable[..., Path]
Arrays = dict[str, Any]


def without(*prefixes: str) -> Callable[[Arrays, Any], None]:
    def change(arrays: Arrays, meta: Any) -> None:
        for name in [name for name in arrays if name.startswith(prefixes)]:
            del arrays[name]

    return change


def whole(source: FeatureSource, modality: str, split: str) -> torch.Tensor:
    dataset = source.dataset(modality, split)
    return dataset[list(range(len(dataset)))]["values"]


def test_rows_of_all_modalities_and_targets_belong_together(write_features: Write) -> None:
    arrays: Arrays = {}
    source = FeatureSource(write_features(lambda a, meta: arrays.update(a)), "meld")
    for index, split in enumerate(SPLITS):
        rows = arrays["split"] == index
        assert source.targets(split).tolist() == arrays["label"][rows].tolist()
        assert source.targets(split).dtype == torch.int64
        text = whole(source, "text", split)[:, -1]
        assert torch.equal(text, torch.from_numpy(arrays["text_sentence"][rows]))
        audio = np.concatenate([arrays["audio_pitch"], arrays["audio_voice"]], axis=1)
        standard = whole(source, "audio", split).numpy()
        assert np.corrcoef(standard[:, 0], audio[rows, 0])[0, 1] == pytest.approx(1)
        assert np.corrcoef(standard[:, 5], audio[rows, 5])[0, 1] == pytest.approx(1)


def test_audio_and_visual_are_standardised_by_train(write_features: Write) -> None:
    def shift_test(arrays: Arrays, meta: Any) -> None:
        arrays["audio_voice"][arrays["split"] == 2] += 2.0

    source = FeatureSource(write_features(shift_test), "meld")
    train = whole(source, "audio", "train")
    torch.testing.assert_close(train.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(6), atol=1e-5, rtol=0)
    assert (whole(source, "audio", "test")[:, 2:].mean(0) > 0.5).all()


def test_missing_rows_are_zero_and_count_for_nothing(write_features: Write) -> None:
    def spoil(arrays: Arrays, meta: Any) -> None:
        arrays["visual_mask"] = np.ones(80, np.uint8)
        arrays["visual_mask"][[2, 50, 75]] = 0
        arrays["visual_face"][2] = np.nan
        arrays["visual_face"][50] = 1e30

    source = FeatureSource(write_features(spoil), "meld")
    train = whole(source, "visual", "train")
    assert (train[2] == 0).all()
    assert (whole(source, "visual", "dev")[10] == 0).all()
    assert (whole(source, "visual", "test")[16] == 0).all()
    there = torch.arange(40) != 2
    torch.testing.assert_close(train[there].mean(0), torch.zeros(5), atol=1e-5, rtol=0)


def test_outliers_are_cut_and_constant_columns_are_zero(write_features: Write) -> None:
    def spoil(arrays: Arrays, meta: Any) -> None:
        arrays["audio_voice"][79] = 1e6
        arrays["audio_pitch"][:, 1] = 7.0

    source = FeatureSource(write_features(spoil), "meld")
    assert (whole(source, "audio", "test")[-1, 2:] == LARGEST).all()
    assert (whole(source, "audio", "train")[:, 1] == 0).all()


def test_a_modality_without_arrays_is_missing(write_features: Write) -> None:
    source = FeatureSource(write_features(without("visual_")), "meld")
    assert source.modalities == ("text", "audio")


def test_modalities_choose_and_keep_text(write_features: Write) -> None:
    folder = write_features()
    assert FeatureSource(folder, "meld").modalities == ("text", "audio", "visual")
    assert FeatureSource(folder, "meld", ("visual",)).modalities == ("text", "visual")
    assert FeatureSource(folder, "meld", ("text",)).modalities == ("text",)


def test_refuses_a_modality_that_is_not_there(write_features: Write) -> None:
    with pytest.raises(InputError, match=r"--modalities: expected some of text, audio.* visual"):
        FeatureSource(write_features(without("visual_")), "meld", ("visual",))


def test_refuses_a_folder_without_text(write_features: Write) -> None:
    with pytest.raises(InputError, match=r"expected arrays text_\*.* got only audio, visual"):
        FeatureSource(write_features(without("text_")), "meld")


def test_refuses_a_modality_without_any_row_in_train(write_features: Write) -> None:
    def spoil(arrays: Arrays, meta: Any) -> None:
        arrays["audio_mask"] = (arrays["split"] > 0).astype(np.uint8)

    with pytest.raises(InputError, match="audio_pitch: expected rows of train"):
        FeatureSource(write_features(spoil), "meld")


def test_encoders_fit_their_datasets_and_the_seed(write_features: Write) -> None:
    source = FeatureSource(write_features(), "meld")
    for modality in source.modalities:
        torch.manual_seed(0)
        encoder = source.encoder(modality).eval()
        torch.manual_seed(0)
        twin = source.encoder(modality).eval()
        batch = source.dataset(modality, "dev")[[3, 0, 18]]
        output = encoder(**batch)
        assert isinstance(output, EncoderOutput)
        assert output.logits.shape == (3, 3)
        assert output.features.shape == (3, 144)
        assert torch.equal(output.features, twin(**batch).features)


def test_description_follows_the_content(write_features: Write) -> None:
    first = FeatureSource(write_features(), "meld").description
    assert first == FeatureSource(write_features(), "meld", ("text",)).description

    def change(arrays: Arrays, meta: Any) -> None:
        arrays["label"][0] = (arrays["label"][0] + 1) % 3

    assert first != FeatureSource(write_features(change), "meld").description


def test_embedded_sentences_have_no_prompt_to_leave_out(
    write_features: Callable[..., Path],
) -> None:
    with pytest.raises(InputError, match="which no question ends; use --raw or --synthetic"):
        FeatureSource(write_features(), "meld").without_prompt()
