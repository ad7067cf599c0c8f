from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.erc.errors import InputError
from examples.synthetic.encoders import write

TEXTS = ("I'm so happy about the soup!", "Okay.", "How dare you ruin the party!")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("encoders"), TEXTS)


def load(kind: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)


def test_folders_are_named_after_the_modalities(folders: dict[str, Path]) -> None:
    assert {key: path.name for key, path in folders.items()} == {
        "text": "text", "audio": "audio", "visual": "visual",
    }  # fmt: skip


def test_text_encoder_is_a_roberta_with_its_special_tokens(folders: dict[str, Path]) -> None:
    tokenizer, model = load("AutoTokenizer", folders["text"]), load("AutoModel", folders["text"])
    assert type(model).__name__ == "RobertaModel"
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip
    assert tokenizer.mask_token == "<mask>"
    batch = tokenizer(["Okay.", "I'm so happy. <mask>"], padding=True, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "Okay."
    assert model(**batch).last_hidden_state.shape == (*batch["input_ids"].shape, 128)


def test_words_of_the_corpus_are_single_tokens_wherever_they_stand(
    folders: dict[str, Path],
) -> None:
    tokenizer = load("AutoTokenizer", folders["text"])
    for text in ("Okay", " Okay", " happy", " ruin", " party"):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


def test_tokenizer_knows_every_byte(folders: dict[str, Path]) -> None:
    tokenizer = load("AutoTokenizer", folders["text"])
    ids = tokenizer("Grüße, 你好! \x92", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "Grüße, 你好! \x92"


def test_audio_encoder_is_a_data2vec_with_the_published_stride(folders: dict[str, Path]) -> None:
    extract, model = (
        load("AutoFeatureExtractor", folders["audio"]),
        load("AutoModel", folders["audio"]),
    )
    assert type(model).__name__ == "Data2VecAudioModel"
    assert int(np.prod(model.config.conv_stride)) == 320
    sound = [np.random.default_rng(0).standard_normal(n).astype(np.float32) for n in (9000, 16000)]
    batch = extract(sound, sampling_rate=16000, padding=True, return_tensors="pt")
    assert set(batch) == {"input_values", "attention_mask"}
    assert float(batch["input_values"][0, :9000].std()) == pytest.approx(1.0, abs=0.01)
    assert model(**batch).last_hidden_state.shape == (2, 48, 64)


def test_visual_encoder_is_a_timesformer_for_eight_frames(folders: dict[str, Path]) -> None:
    process, model = (
        load("AutoImageProcessor", folders["visual"]),
        load("AutoModel", folders["visual"]),
    )
    assert type(model).__name__ == "TimesformerModel"
    frames = [Image.new("RGB", (128, 96), (255, 0, 0)) for _ in range(8)]
    pixels = process(frames, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 8, 3, 48, 48)
    assert pixels[0, 0, :, 24, 24].tolist() == pytest.approx([0.55 / 0.225, -2.0, -2.0], abs=1e-3)
    assert model(pixels).last_hidden_state.shape == (1, 1 + 8 * 9, 64)


def test_seed_decides_the_weights_and_the_global_generator_is_left_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    same, other = write(tmp_path / "same", TEXTS), write(tmp_path / "other", TEXTS, seed=1)
    assert torch.equal(torch.rand(3), expected)
    for modality, folder in folders.items():
        for path in folder.iterdir():
            assert (same[modality] / path.name).read_bytes() == path.read_bytes(), path.name
        weights = "model.safetensors"
        assert (other[modality] / weights).read_bytes() != (folder / weights).read_bytes()


def test_older_encoders_are_replaced(tmp_path: Path) -> None:
    paths = write(tmp_path, TEXTS)
    (paths["text"] / "left.json").write_text("{}")
    write(tmp_path, TEXTS)
    assert not (paths["text"] / "left.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"text", "audio", "visual"}


def test_no_texts_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at least one utterance, got none"):
        write(tmp_path / "encoders", [])
    assert not (tmp_path / "encoders").exists()
