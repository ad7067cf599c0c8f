"""One epoch of each stage of the pipeline, from files against from what was kept.

Both go through the training loop of the pipeline; what differs is where a batch comes from, and
what is computed again for it.

- *Anew*, as the code that was released with the paper does it: every batch of every stage decodes
  the voices and pictures of its utterances, also where only the words are looked at. A student's
  batch goes through the teacher as well, a batch of the fusion through all three encoders. As many
  processes load batches ahead as there are processors.
- *Kept*: the clips, what the teacher said and the features were computed before, and are read.

Decoding anew is not made slower than it has to be: it takes the eight pictures by seeking, as
filling the cache does.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.erc import artifacts, pictures, sound
from examples.erc.audio import AudioDataset, WaveformCollator
from examples.erc.dialogue import Clip, Utterance
from examples.erc.fusion import FrozenFeatures, ShiftingHead
from examples.erc.objectives import Classification, Distillation, Share
from examples.erc.pretrained import Pretrained
from examples.erc.raw import RawSource
from examples.erc.source import MODALITIES, Dataset, EncoderOutput, Phase
from examples.erc.training import Hardware, Objective, compute, draw_batches, train
from examples.erc.visual import FrameFitter, VisualDataset
from examples.meld.corpus import read
from examples.meld.recipes import RELEASED
from examples.synthetic import encoders
from examples.synthetic.source import OPTIMISATION

MAX_SECONDS = 30.0
SEED = 0
KEPT_EPOCHS = 3
"""An epoch that reads is short; one that decodes is measured once."""


@dataclass(frozen=True)
class Stage:
    """What was measured of a stage.

    Attributes:
        stage: Its name.
        steps: Optimiser steps of an epoch.
        epochs: As many as the stage has.
        anew_seconds: An epoch that decodes and computes everything again.
        kept_seconds: An epoch that reads what was kept.
        fill_seconds: What keeping it took: all of it, also what other stages use too.
        anew_over_kept: Their ratio once everything is kept.
        with_filling: The ratio over all epochs of the stage, filling included.
        required: The ratio to reach, if one was set.
    """

    stage: str
    steps: int
    epochs: int
    anew_seconds: float
    kept_seconds: float
    fill_seconds: float
    anew_over_kept: float
    with_filling: float
    required: float | None


class Stages:
    """The stages on a corpus in the layout of MELD, with the synthetic corpus's tiny encoders.

    Args:
        root: Of the corpus.
        scratch: A folder for encoders and caches.
        loaders: Processes that load batches ahead where they are decoded anew.
    """

    def __init__(self, root: Path, scratch: Path, loaders: int) -> None:
        self._loaders = loaders
        corpus = read(root)
        texts = [row.text for split in corpus.splits for row in corpus.utterances(split)]
        paths = encoders.write(scratch / "encoders", texts, seed=SEED)
        self._sources = {
            modality: RawSource(
                corpus,
                "Synthetic MELD",
                encoders={name: str(paths[name]) for name in ("text", modality)},
                max_seconds=MAX_SECONDS,
            )
            for modality in MODALITIES[1:]
        }
        self._decoding = {
            modality: _timed(partial(source.prepare, scratch / modality))
            for modality, source in self._sources.items()
        }
        self._source = self._sources["audio"]
        self._files = _Files(corpus.utterances("train"), self._dataset("text"), paths)
        torch.manual_seed(SEED)
        self._encoders = {modality: self._encoder(modality).eval() for modality in MODALITIES}
        self._said: dict[str, dict[str, Tensor]] = {}
        self._saying = {modality: _timed(partial(self._say, modality)) for modality in MODALITIES}

    def measure(self) -> Iterator[dict[str, Any]]:
        """Measure one stage after the other."""
        yield self._teacher()
        for modality in MODALITIES[1:]:
            yield self._student(modality)
        yield self._fusion()

    def _teacher(self) -> dict[str, Any]:
        """No media is needed, and none is read."""
        return self._compare(
            "teacher",
            "teacher",
            anew=(lambda: _Only(self._encoder("text"), "text"), self._classification()),
            kept=(lambda: self._encoder("text"), self._classification(), self._dataset("text")),
            fill=0.0,
            required=None,
        )

    def _student(self, modality: str) -> dict[str, Any]:
        teacher = self._encoders["text"]
        said = {name: torch.zeros_like(values) for name, values in self._said["text"].items()}
        fresh, kept = self._distillation(said), self._distillation(self._said["text"])

        def objective(output: Any, share: Share) -> Tensor:  # noqa: ANN401
            for name, values in output.said._asdict().items():
                said[name][share.rows] = values
            return fresh(EncoderOutput(output.features, output.logits), share)

        return self._compare(
            f"student, {modality}",
            "student",
            anew=(lambda: _Taught(self._encoder(modality), modality, teacher), objective),
            kept=(lambda: self._encoder(modality), kept, self._dataset(modality)),
            fill=self._decoding[modality] + self._saying["text"],
            required=2.0,
        )

    def _fusion(self) -> dict[str, Any]:
        features = {modality: self._said[modality]["features"] for modality in MODALITIES}
        widths = {modality: values.shape[1] for modality, values in features.items()}

        def head() -> ShiftingHead:
            return ShiftingHead(widths, len(self._source.labels), RELEASED.fusion)

        return self._compare(
            "fusion",
            "fusion",
            anew=(lambda: _Encoding(head(), self._encoders), self._classification()),
            kept=(head, self._classification(), FrozenFeatures(features)),
            fill=sum(self._decoding.values()) + sum(self._saying.values()),
            required=50.0,
        )

    def _compare(
        self,
        stage: str,
        phase: Phase,
        *,
        anew: tuple[Callable[[], nn.Module], Objective],
        kept: tuple[Callable[[], nn.Module], Objective, Dataset],
        fill: float,
        required: float | None,
    ) -> dict[str, Any]:
        optimisation = OPTIMISATION[phase]
        order = torch.Generator().manual_seed(SEED)
        for _ in range(2):  # the loop draws once to count, and then for each epoch
            batches = draw_batches(len(self._files), optimisation.batch_size, order)

        def epochs(
            build: Callable[[], nn.Module], objective: Objective, dataset: Dataset, count: int
        ) -> float:
            clock = _Clock(count)
            datasets = {
                "train": _Watched(dataset, clock.begin),
                "dev": _Watched(dataset, clock.end),
            }
            try:
                train(
                    build,
                    objective,
                    datasets,
                    self._source.targets("train"),
                    optimisation,
                    seed=SEED,
                    hardware=Hardware("cpu"),
                    title=stage,
                )
            except _EnoughError:
                return sum(clock.seconds) / count
            raise AssertionError("more epochs were asked for than there are")

        kept_seconds = epochs(*kept, KEPT_EPOCHS)
        anew_seconds = epochs(*anew, _Ahead(self._files, batches, self._loaders), 1)
        with_filling = optimisation.epochs * anew_seconds
        with_filling /= fill + optimisation.epochs * kept_seconds
        return asdict(
            Stage(
                stage,
                len(batches),
                optimisation.epochs,
                anew_seconds,
                kept_seconds,
                fill,
                anew_seconds / kept_seconds,
                with_filling,
                required,
            )
        )

    def _dataset(self, modality: str) -> Dataset:
        return self._sources.get(modality, self._source).dataset(modality, "train")

    def _encoder(self, modality: str) -> nn.Module:
        return self._sources.get(modality, self._source).encoder(modality)

    def _say(self, modality: str) -> None:
        dataset, encoder = self._dataset(modality), self._encoders[modality]
        self._said[modality] = compute(encoder, dataset, OPTIMISATION["teacher"].batch_size)

    def _classification(self) -> Classification:
        labels = self._source.targets("train")
        return Classification(labels, len(self._source.labels), RELEASED.classification)

    def _distillation(self, said: Mapping[str, Tensor]) -> Distillation:
        return Distillation(
            self._classification(), RELEASED.student, said["logits"], said["features"]
        )


# A larger corpus ---------------------------------------------------------------------------------


def enlarge(corpus: Path, folder: Path, width: int, height: int) -> None:
    """Copy a corpus in the layout of MELD with larger pictures; what is there already is kept.

    The pictures are scaled and encoded as those of the synthetic corpus are; nothing is added that
    would be hard to predict, so that real films of the same size take longer to decode.

    Args:
        corpus: Its root.
        folder: That of the copy.
        width: Of the pictures.
        height: Of the pictures.
    """
    for table in sorted(corpus.glob("*.csv")):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, folder)
    clips = sorted(corpus.glob("*/*.mp4"))
    todo = [clip for clip in clips if not (folder / clip.relative_to(corpus)).exists()]
    for clip in tqdm(todo, desc=f"{width} x {height}", unit="clip", disable=None):
        path = folder / clip.relative_to(corpus)
        path.parent.mkdir(exist_ok=True)
        artifacts.replace(path, lambda part: _enlarge(clip, part, width, height))  # noqa: B023


def _enlarge(clip: Path, path: Path, width: int, height: int) -> None:
    with av.open(str(clip)) as source, av.open(str(path), "w", format="mp4") as copy:
        film, voice = source.streams.video[0], source.streams.audio[0]
        options = {"crf": "20", "preset": "veryfast", "threads": "1"}
        stream = copy.add_stream("libx264", film.average_rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        sound_copy = copy.add_stream_from_template(voice)
        for packet in source.demux(film, voice):
            if packet.stream is voice:
                if packet.dts is not None:
                    packet.stream = sound_copy
                    copy.mux(packet)
                continue
            for picture in film.decode(packet):
                larger = picture.reformat(width, height, interpolation="BICUBIC")
                larger.pict_type = 0  # the encoder chooses anew
                copy.mux(stream.encode(larger))
        copy.mux(stream.encode(None))


# A batch from its files --------------------------------------------------------------------------


class _Files:
    """All modalities of the training split, decoded whenever they are asked for."""

    def __init__(
        self, utterances: Sequence[Utterance], text: Dataset, paths: Mapping[str, Path]
    ) -> None:
        self._utterances = utterances
        self._text = text
        self._collator = WaveformCollator(Pretrained(str(paths["audio"])))
        self._fitter = FrameFitter(Pretrained(str(paths["visual"])))

    def __len__(self) -> int:
        return len(self._utterances)

    def __getitem__(self, rows: list[int]) -> dict[str, Any]:
        voices: Any = {row: self._voice(self._utterances[row].audio) for row in rows}
        films: Any = {row: self._film(self._utterances[row].visual) for row in rows}
        return {
            "text": self._text[rows],
            "audio": AudioDataset(voices, self._collator)[rows],
            "visual": VisualDataset(films, self._fitter)[rows],
        }

    def _voice(self, clip: Clip | None) -> Tensor:
        assert clip is not None
        waveform, _ = sound.decode_waveform(clip, MAX_SECONDS)
        return torch.from_numpy(sound.quantise(waveform))

    def _film(self, clip: Clip | None) -> Tensor:
        assert clip is not None
        decoded, _ = pictures.decode_frames(clip, self._fitter.count, MAX_SECONDS)
        return torch.from_numpy(np.ascontiguousarray(self._fitter.fit(decoded)))


class _Ahead:
    """Batches that other processes load, in the order in which they will be asked for."""

    def __init__(self, files: _Files, batches: Sequence[list[int]], loaders: int) -> None:
        self._files = files
        self._expected = iter(batches)
        self._loader: DataLoader[Any] = DataLoader(
            files,  # type: ignore[arg-type]
            batch_size=None,
            sampler=batches,
            num_workers=loaders,
        )
        self._loaded: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, rows: list[int]) -> dict[str, Any]:
        if self._loaded is None:  # the processes start with the clock
            self._loaded = iter(self._loader)
        assert rows == next(self._expected)
        loaded: dict[str, Any] = next(self._loaded)
        return loaded


# Models that compute again what could have been kept ---------------------------------------------


class _Only(nn.Module):
    """An encoder that is given all modalities."""

    def __init__(self, encoder: nn.Module, modality: str) -> None:
        super().__init__()
        self.encoder = encoder
        self._modality = modality

    def forward(self, **inputs: Mapping[str, Tensor]) -> EncoderOutput:
        output: EncoderOutput = self.encoder(**inputs[self._modality])
        return output


class _TaughtOutput(NamedTuple):
    features: Tensor
    logits: Tensor
    said: EncoderOutput


class _Taught(_Only):
    """A student whose teacher looks at every batch."""

    def __init__(self, encoder: nn.Module, modality: str, teacher: nn.Module) -> None:
        super().__init__(encoder, modality)
        self._teacher = (teacher,)  # no part of what is trained

    def forward(self, **inputs: Mapping[str, Tensor]) -> _TaughtOutput:  # type: ignore[override]
        with torch.no_grad():
            said = self._teacher[0](**inputs["text"])
        return _TaughtOutput(*super().forward(**inputs), said)


class _Encoding(nn.Module):
    """A head whose frozen encoders look at every batch."""

    def __init__(self, head: nn.Module, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.head = head
        self._encoders = (encoders,)

    def forward(self, **inputs: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
        with torch.no_grad():
            features = {
                modality: encoder(**inputs[modality]).features
                for modality, encoder in self._encoders[0].items()
            }
        return self.head(**features)


# Time --------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """All epochs that were to be measured are over."""


class _Clock:
    """Notes how long each epoch is, from its first batch to the first that is evaluated."""

    def __init__(self, epochs: int) -> None:
        self.seconds: list[float] = []
        self._epochs = epochs
        self._began: float | None = None

    def begin(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def end(self) -> None:
        if self._began is None:
            return
        self.seconds.append(time.perf_counter() - self._began)
        self._began = None
        if len(self.seconds) == self._epochs:
            raise _EnoughError


class _Watched:
    """A dataset that calls before it gives a batch."""

    def __init__(self, whole: Dataset, call: Callable[[], None]) -> None:
        self._whole = whole
        self._call = call

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        self._call()
        return self._whole[rows]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
