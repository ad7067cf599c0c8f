import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.erc.dialogue import Clip, Corpus, Dialogue, Utterance
from examples.erc.errors import InputError
from examples.erc.raw import RawSource
from examples.erc.source import SPLITS, EncoderOutput, Source

LABELS = ("joy", "neutral", "sadness")
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]
PITCHES = [300, 600, 900]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_film: Callable[..., Path]) -> Corpus:
    """Three utterances a split; label n has its own colour and pitch, the last one has no clip."""
    folder = tmp_path_factory.mktemp("corpus")
    splits = {}
    for split in SPLITS:
        utterances = []
        for number in range(3):
            tone = 0.5 * np.sin(2 * np.pi * PITCHES[number] * np.arange(24_000) / 48_000)
            path = folder / f"{split}_utt{number}.mp4"
            write_film(path, [COLOURS[number]] * 12, sound=tone[None])
            clip = None if number == 2 else Clip(path)
            utterances.append(
                Utterance(f"{split}_utt{number}", "hello there", number % 2, number, clip, clip)
            )
        splits[split] = (Dialogue(f"{split}_dia0", tuple(utterances)),)
    return Corpus("meld", LABELS, splits)


@pytest.fixture(scope="module")
def make_source(corpus: Corpus, tiny_encoders: dict[str, str]) -> Callable[..., RawSource]:
    def make(corpus: Corpus = corpus, **options: object) -> RawSource:
        arguments = {"encoders": tiny_encoders, "max_text_tokens": 64, "workers": 2, **options}
        return RawSource(corpus, "MELD", **arguments)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def source(
    make_source: Callable[..., RawSource], tmp_path_factory: pytest.TempPathFactory
) -> RawSource:
    source = make_source()
    source.prepare(tmp_path_factory.mktemp("run"))
    return source


def test_it_is_a_source(source: RawSource) -> None:
    as_source: Source = source

    assert (as_source.name, as_source.title, as_source.labels) == ("meld", "MELD", LABELS)
    assert as_source.modalities == ("text", "audio", "visual")
    assert as_source.optimisation("teacher") is None


@pytest.mark.parametrize("modality", ["text", "audio", "visual"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_batch_goes_through_its_encoder(source: RawSource, modality: str, split: str) -> None:
    torch.manual_seed(0)
    encoder = source.encoder(modality).eval()
    dataset = source.dataset(modality, split)

    output = encoder(**dataset[[2, 0]])

    assert isinstance(output, EncoderOutput)
    assert len(dataset) == len(source.targets(split)) == 3
    assert output.features.shape == (2, source.feature_size)
    assert output.logits.shape == (2, len(LABELS))


def test_all_features_have_the_smallest_width(source: RawSource) -> None:
    assert source.feature_size == 8


def test_row_i_is_the_same_utterance_everywhere(source: RawSource) -> None:
    rows = [1, 0]

    targets = source.targets("dev")[rows]
    voices = source.dataset("audio", "dev")[rows]
    pictures = source.dataset("visual", "dev")[rows]["pixel_values"]

    assert targets.tolist() == rows
    for place, row in enumerate(rows):
        voice = voices["input_values"][place][voices["attention_mask"][place].bool()]
        spectrum = torch.fft.rfft(voice).abs()
        pitch = spectrum.argmax().item() * 16_000 / len(voice)
        assert pitch == pytest.approx(PITCHES[row], abs=5)
        assert pictures[place].mean(dim=(0, 2, 3)).argmax().item() == row


def test_an_utterance_without_a_clip_is_marked(source: RawSource) -> None:
    for modality in ("audio", "visual"):
        batch = source.dataset(modality, "test")[[0, 2]]
        assert batch["present"].tolist() == [True, False]


def test_targets_are_integers_in_row_order(source: RawSource) -> None:
    targets = source.targets("train")

    assert targets.dtype == torch.int64
    assert targets.tolist() == [0, 1, 2]


def test_encoders_follow_the_global_seed(source: RawSource) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        weights = dict(source.encoder("audio").named_parameters())
        return weights["head.classifier.weight"].detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_preparing_leaves_the_global_seed_alone(source: RawSource, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    source.prepare(tmp_path)

    assert torch.equal(torch.rand(3), expected)


def test_preparing_writes_into_the_run_folder_alone(
    make_source: Callable[..., RawSource], tmp_path: Path
) -> None:
    make_source().prepare(tmp_path)

    folders = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")}
    assert folders == {
        f"clips/{modality}/{split}" for modality in ("audio", "visual") for split in SPLITS
    }


def test_clips_are_asked_for_before_they_are_decoded(
    make_source: Callable[..., RawSource],
) -> None:
    with pytest.raises(RuntimeError, match="call prepare first"):
        make_source().dataset("audio", "train")


def test_text_alone_needs_no_clips(
    make_source: Callable[..., RawSource], tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    source = make_source(encoders={"text": tiny_encoders["text"], "audio": None})

    source.prepare(tmp_path)

    assert source.modalities == ("text",)
    assert source.feature_size == 16
    assert list(tmp_path.iterdir()) == []


def test_the_description_is_json_without_places(source: RawSource) -> None:
    text = json.dumps(source.description)

    assert '"kind": "raw"' in text
    assert str(Path.cwd()) not in text
    assert "/tmp" not in text


def test_the_description_changes_with_everything_that_matters(
    make_source: Callable[..., RawSource], corpus: Corpus
) -> None:
    def change(**values: object) -> Corpus:
        dialogue = corpus.splits["dev"][0]
        utterance = replace(dialogue.utterances[1], **values)  # type: ignore[arg-type]
        changed = replace(dialogue, utterances=(dialogue.utterances[0], utterance))
        return replace(corpus, splits={**corpus.splits, "dev": (changed,)})

    clip = corpus.splits["dev"][0].utterances[1].visual
    assert clip is not None
    descriptions = [
        make_source().description,
        make_source(max_seconds=5.0).description,
        make_source(max_text_tokens=32).description,
        make_source(change(text="other")).description,
        make_source(change(label=2)).description,
        make_source(change(speaker=2)).description,
        make_source(change(audio=None)).description,
        make_source(change(visual=replace(clip, start=0.1, end=0.2))).description,
    ]

    assert make_source().description == descriptions[0]
    assert len({json.dumps(description) for description in descriptions}) == len(descriptions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": {"audio": "a"}}, r"encoders: expected text, .* got audio;"),
        ({"encoders": {"text": "a", "video": "b"}}, r"encoders: expected text, .* got text, video"),
        ({"revisions": {"texts": "main"}}, r"encoders: expected text, .* got .*texts"),
        ({"max_seconds": 0.0}, r"max_seconds: expected a finite number > 0, got 0\.0"),
        ({"max_seconds": float("nan")}, r"max_seconds: .* got nan"),
        ({"workers": 0}, r"workers: expected at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    make_source: Callable[..., RawSource], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_source(**options)


def test_a_split_without_any_clip_is_refused_before_work(
    make_source: Callable[..., RawSource], corpus: Corpus
) -> None:
    dialogue = corpus.splits["dev"][0]
    bare = tuple(replace(utterance, audio=None) for utterance in dialogue.utterances)
    splits = {**corpus.splits, "dev": (replace(dialogue, utterances=bare),)}

    with pytest.raises(InputError, match=r"MELD audio, dev: expected clips .* dev_utt0; unpack"):
        make_source(replace(corpus, splits=splits))


def test_a_broken_encoder_is_found_before_clips_are_decoded(
    make_source: Callable[..., RawSource], tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    empty = tmp_path / "encoder"
    empty.mkdir()
    for path in Path(tiny_encoders["visual"]).glob("*.json"):
        (empty / path.name).write_bytes(path.read_bytes())
    source = make_source(encoders={**tiny_encoders, "visual": str(empty)})

    with pytest.raises(InputError, match="expected an encoder for AutoModel"):
        source.prepare(tmp_path / "run")
    assert not (tmp_path / "run").exists()
