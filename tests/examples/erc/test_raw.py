import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from examples.erc.crew import Crew
from examples.erc.dialogue import Clip, Corpus, Dialogue, Utterance
from examples.erc.errors import InputError
from examples.erc.ledger import Policy
from examples.erc.raw import RawSource
from examples.erc.source import MODALITIES, SPLITS, EncoderOutput, Source

LABELS = ("joy", "neutral", "sadness")
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]
PITCHES = [300, 600, 900]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_film: Callable[..., Path]) -> Corpus:
    """Three utterances a split; label n has its own colour and pitch, the last one has no clip.

    The pictures become darker, and each split is louder than the one before.
    """
    folder = tmp_path_factory.mktemp("corpus")
    splits = {}
    for loudness, split in zip((0.3, 0.4, 0.5), SPLITS, strict=True):
        utterances = []
        for number in range(3):
            tone = loudness * np.sin(2 * np.pi * PITCHES[number] * np.arange(24_000) / 48_000)
            path = folder / f"{split}_utt{number}.mp4"
            shades = [
                tuple(int(part * (1 - 0.04 * dark)) for part in COLOURS[number])
                for dark in range(12)
            ]
            write_film(path, shades, sound=tone[None])
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

    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in paths} == {tmp_path / "clips"}
    names = {path.name for path in paths} - {"ledger.json", "sources.json"}
    assert sorted(name.partition("-")[0] for name in names) == ["audio"] * 3 + ["visual"] * 3


def test_runs_can_share_their_clips(
    make_source: Callable[..., RawSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_source(cache=tmp_path / "cache")
    first.prepare(tmp_path / "one")
    monkeypatch.setattr(Crew, "decode", None)
    second = make_source(cache=tmp_path / "cache")
    second.prepare(tmp_path / "two")

    assert second.describe(MODALITIES) == first.describe(MODALITIES)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2 * len(SPLITS)
    for run in ("one", "two"):
        assert [path.name for path in (tmp_path / run / "clips").iterdir()] == ["ledger.json"]


def test_clips_of_other_settings_do_not_stay_in_the_run_folder(
    make_source: Callable[..., RawSource], tmp_path: Path
) -> None:
    make_source(max_seconds=0.2).prepare(tmp_path)
    before = {path.name for path in (tmp_path / "clips").glob("*.safetensors")}
    make_source().prepare(tmp_path)

    after = {path.name for path in (tmp_path / "clips").glob("*.safetensors")}
    assert len(before) == len(after) == 2 * len(SPLITS)
    assert not before & after


def read_ledger(folder: Path) -> dict[str, Any]:
    ledger: dict[str, Any] = json.loads((folder / "clips" / "ledger.json").read_text("utf-8"))
    return ledger


def break_clip(corpus: Corpus, folder: Path, split: str = "train") -> Corpus:
    """The corpus with a first clip of a split that nothing can decode."""
    path = folder / "broken.mp4"
    path.write_bytes(b"no film" * 100)
    dialogue = corpus.splits[split][0]
    first = replace(dialogue.utterances[0], audio=Clip(path), visual=Clip(path))
    changed = replace(dialogue, utterances=(first, *dialogue.utterances[1:]))
    return replace(corpus, splits={**corpus.splits, split: (changed,)})


@pytest.mark.parametrize("policy", get_args(Policy))
def test_the_ledger_accounts_for_every_row(
    make_source: Callable[..., RawSource], corpus: Corpus, tmp_path: Path, policy: Policy
) -> None:
    whole = replace(
        corpus,
        splits={
            split: tuple(replace(d, utterances=d.utterances[:2]) for d in dialogues)
            for split, dialogues in corpus.splits.items()
        },
    )
    source = make_source(break_clip(whole, tmp_path), bad_clips=policy)
    if policy == "fail":
        message = r"got 2 that cannot \(audio, train, train_utt0: Invalid data.*ledger\.json lists"
        with pytest.raises(InputError, match=message):
            source.prepare(tmp_path)
    else:
        source.prepare(tmp_path)

    ledger = read_ledger(tmp_path)
    assert ledger["policy"] == policy
    places = [(place["modality"], place["split"]) for place in ledger["clips"]]
    assert places == [(modality, split) for modality in MODALITIES[1:] for split in SPLITS]
    for place in ledger["clips"]:
        assert place["used"] + place["quarantined"] == place["rows"] == 2
        broken = place["split"] == "train"
        assert place["quarantined"] == len(place["faults"]) == broken
        assert place["damaged"] == 0
        if broken:
            (fault,) = place["faults"]
            assert fault["utterance"] == "train_utt0"
            assert fault["kind"] == "broken"
            assert fault["reason"].startswith("Invalid data")
            assert fault["file"] == str(tmp_path / "broken.mp4")


def test_masked_utterances_stay(
    make_source: Callable[..., RawSource],
    corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_source(break_clip(corpus, tmp_path))
    source.prepare(tmp_path)

    path = tmp_path / "clips" / "ledger.json"
    line = f"MELD: 8 clips cannot be had, and are masked; {path} lists them\n"
    assert capsys.readouterr().err.endswith(line)

    assert source.targets("train").tolist() == [0, 1, 2]
    for modality in ("audio", "visual"):
        batch = source.dataset(modality, "train")[[0, 1, 2]]
        assert batch["present"].tolist() == [False, True, False]


def test_skipped_utterances_are_left_out_of_every_modality(
    make_source: Callable[..., RawSource], corpus: Corpus, tmp_path: Path
) -> None:
    masked, source = make_source(), make_source(break_clip(corpus, tmp_path), bad_clips="skip")
    masked.prepare(tmp_path / "masked")
    source.prepare(tmp_path)

    assert source.targets("train").tolist() == [1]
    assert source.targets("dev").tolist() == [0, 1]
    for modality in MODALITIES:
        assert len(source.dataset(modality, "train")) == 1
        assert len(source.dataset(modality, "dev")) == 2
        for name, values in source.dataset(modality, "train")[[0]].items():
            # Of text, this is the prompt with the utterance that is left out as its context.
            assert torch.equal(values, masked.dataset(modality, "train")[[1]][name])


def test_a_split_of_which_nothing_is_left_is_refused(
    make_source: Callable[..., RawSource], corpus: Corpus, tmp_path: Path
) -> None:
    bad = break_clip(corpus, tmp_path, "dev")
    dialogue = bad.splits["dev"][0]
    only = replace(dialogue, utterances=(dialogue.utterances[0], dialogue.utterances[2]))
    silent = replace(bad, splits={**bad.splits, "dev": (only,)})

    with pytest.raises(InputError, match=r"MELD audio, dev: .* none in 2 \(dev_utt0: Invalid"):
        make_source(silent).prepare(tmp_path)

    first = replace(dialogue.utterances[0], audio=dialogue.utterances[1].audio)
    second = replace(dialogue.utterances[1], audio=None)
    crossed = replace(dialogue, utterances=(first, second))
    source = make_source(replace(bad, splits={**bad.splits, "dev": (crossed,)}), bad_clips="skip")
    with pytest.raises(InputError, match="MELD, dev: expected utterances with all their clips"):
        source.prepare(tmp_path)


def test_a_missing_file_fails_before_any_work(make_source: Callable[..., RawSource]) -> None:
    with pytest.raises(InputError, match=r"MELD audio, train: .*no file for 1 for 3 .*train_utt2"):
        make_source(bad_clips="fail")


def test_only_films_of_two_can_be_cropped(make_source: Callable[..., RawSource]) -> None:
    with pytest.raises(
        InputError, match=r"films that two speakers share.*leave the pictures whole"
    ):
        make_source(crop=True)


def test_the_speakers_half_is_seen(
    make_source: Callable[..., RawSource],
    corpus: Corpus,
    tmp_path: Path,
    write_film: Callable[..., Path],
) -> None:
    film = write_film(tmp_path / "film.mp4", [(COLOURS[0], COLOURS[2])] * 25)
    sides: list[Any] = ["left", "right", None]
    splits = {
        split: tuple(
            replace(
                dialogue,
                utterances=tuple(
                    replace(utterance, visual=Clip(film, 0.0, 1.0, side))
                    for utterance, side in zip(dialogue.utterances, sides, strict=True)
                ),
            )
            for dialogue in dialogues
        )
        for split, dialogues in corpus.splits.items()
    }
    colours = {}
    for crop in (False, True):
        source = make_source(replace(corpus, splits=splits), crop=crop)
        source.prepare(tmp_path / str(crop))
        pixels = source.dataset("visual", "dev")[[0, 1]]["pixel_values"]
        colours[crop] = pixels.mean(dim=(1, 3, 4)).argmax(dim=1).tolist()
        spread = pixels.std(dim=(1, 3, 4)).max()
        assert (spread < 0.5) == crop

    assert colours[True] == [0, 2]


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


def test_without_the_prompt_the_text_alone_is_another(source: RawSource) -> None:
    whole = source.describe(("text",))
    silent = source.without_prompt()

    assert silent.describe(("text",)) == {**whole, "prompt": False}
    assert silent.describe(("audio", "visual")) == source.describe(("audio", "visual"))
    assert source.describe(("text",)) == whole
    asked, plain = (s.dataset("text", "dev")[[0]]["input_ids"] for s in (source, silent))
    assert torch.equal(asked[:, : plain.shape[1]], plain)
    assert plain.shape[1] < asked.shape[1]
    seen = [s.dataset("audio", "dev")[[0]]["input_values"] for s in (source, silent)]
    assert torch.equal(*seen)


def _change(corpus: Corpus, **values: object) -> Corpus:
    """The corpus with another second utterance of dev."""
    dialogue = corpus.splits["dev"][0]
    first, second, *others = dialogue.utterances
    changed = replace(second, **values)  # type: ignore[arg-type]
    again = replace(dialogue, utterances=(first, changed, *others))
    return replace(corpus, splits={**corpus.splits, "dev": (again,)})


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "nothing": ({}, {}, set()),
    "a longer limit than any clip": ({}, {"max_seconds": 5.0}, set()),
    "a shorter limit": ({}, {"max_seconds": 0.2}, {"audio", "visual"}),
    "shorter prompts": ({}, {"max_text_tokens": 32}, {"text"}),
    "other words": ({"text": "other"}, {}, {"text"}),
    "another speaker": ({"speaker": 2}, {}, {"text"}),
    "another label": ({"label": 2}, {}, {"text", "audio", "visual"}),
    "no voice": ({"audio": None}, {}, {"audio"}),
    "another part of the film": ({"visual": 0.1}, {}, {"visual"}),
    "skipped clips": ({}, {"bad_clips": "skip"}, {"text", "audio", "visual"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_concerns_what_depends_on_it_alone(
    make_source: Callable[..., RawSource],
    source: RawSource,
    corpus: Corpus,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
) -> None:
    values, options, concerned = CHANGES[name]
    if (start := values.get("visual")) is not None:
        clip = corpus.splits["dev"][0].utterances[1].visual
        assert clip is not None
        values = {"visual": replace(clip, start=start, end=0.3)}
    shared = tmp_path_factory.getbasetemp() / "changes"
    changed = make_source(_change(corpus, **values), cache=shared, **options)
    changed.prepare(shared / "run")

    assert {
        modality
        for modality in MODALITIES
        if changed.describe((modality,)) != source.describe((modality,))
    } == concerned
    json.dumps(changed.describe(MODALITIES))


def test_a_replaced_clip_is_noticed(
    make_source: Callable[..., RawSource], corpus: Corpus, tmp_path: Path
) -> None:
    clip = corpus.splits["dev"][0].utterances[1].audio
    assert clip is not None
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip.path.read_bytes())
    changed = _change(corpus, audio=Clip(path))
    first = make_source(changed)
    first.prepare(tmp_path)
    other = corpus.splits["test"][0].utterances[0].audio
    assert other is not None
    path.write_bytes(other.path.read_bytes())
    second = make_source(changed)
    second.prepare(tmp_path)

    assert first.describe(("audio",)) != second.describe(("audio",))
    assert first.describe(("visual",)) == second.describe(("visual",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": {"audio": "a"}}, r"encoders: expected text, .* got audio;"),
        ({"encoders": {"text": "a", "video": "b"}}, r"encoders: expected text, .* got text, video"),
        ({"revisions": {"texts": "main"}}, r"encoders: expected text, .* got .*texts"),
        ({"max_seconds": 0.0}, r"max_seconds: expected a finite number > 0, got 0\.0"),
        ({"max_seconds": float("nan")}, r"max_seconds: .* got nan"),
        ({"workers": 0}, r"workers: expected at least 1, got 0"),
        ({"bad_clips": "hide"}, r"bad_clips: expected one of mask, skip, fail, got 'hide'"),
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
