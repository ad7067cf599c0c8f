"""A corpus of raw clips as the input of the pipeline."""

import copy
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from examples.erc import audio, ledger, text, visual
from examples.erc.cache import Cache
from examples.erc.clips import ClipStore, decode_clips
from examples.erc.crew import Crew, Limits
from examples.erc.dialogue import Clip, Corpus, Utterance
from examples.erc.errors import InputError
from examples.erc.ledger import LEDGER, Place, Policy
from examples.erc.pretrained import Pretrained
from examples.erc.raw_encoding import RawEncoding
from examples.erc.recipe import Optimisation
from examples.erc.source import JSON, MODALITIES, SPLITS, Dataset, Line, Phase

DEFAULT_ENCODERS: dict[str, str | None] = {
    "text": text.DEFAULT_ENCODER,
    "audio": audio.DEFAULT_ENCODER,
    "visual": visual.DEFAULT_ENCODER,
}
"""The encoders of the paper."""

CLIPS = "clips"
"""The folder of the clips in a run's own folder, with their ledger."""


class RawSource:
    """Words, voices and pictures, each through a pretrained encoder; a :class:`Source`.

    Args:
        corpus: What a reader returned.
        title: The corpus as people write it.
        encoders: For each modality an encoder by its name on the Hugging Face Hub, also with its
            revision as ``NAME@REVISION``, or its folder. A modality that is not there, or is
            ``None``, is left out; text is needed.
        revisions: The branch, tag or commit on the Hub, for the modalities that need another than
            the main branch.
        max_text_tokens: The length of the longest prompt; older words are cut.
        max_seconds: The longest part of a clip that is decoded: its first, > 0.
        crop: See only the half of a picture in which the speaker is, where two people share it.
        bad_clips: What to do with an utterance whose clip cannot be had.
        cache: A folder for decoded clips that runs share; ``None``: the run's own.
        workers: Processes that decode, >= 1; ``None``: one for each processor, at most 8.
        limits: What decoding a clip may cost.

    Attributes:
        feature_size: The width of every encoder's feature: the smallest hidden size among them
            (768 for the encoders of the paper, as there). Wider ones are projected.

    Raises:
        InputError: An encoder, an option or the corpus does not fit.
    """

    def __init__(
        self,
        corpus: Corpus,
        title: str,
        *,
        encoders: Mapping[str, str | None] = DEFAULT_ENCODERS,
        revisions: Mapping[str, str] | None = None,
        max_text_tokens: int = 512,
        max_seconds: float = 30.0,
        crop: bool = False,
        bad_clips: Policy = "mask",
        cache: Path | None = None,
        workers: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        chosen = {modality: name for modality, name in encoders.items() if name is not None}
        _check_options(chosen, revisions or {}, max_seconds, workers)
        if bad_clips not in get_args(Policy):
            raise InputError(
                f"bad_clips: expected one of {', '.join(get_args(Policy))}, got {bad_clips!r}; "
                "mask keeps every utterance"
            )
        self.name = corpus.name
        self.title = title
        self.labels = corpus.labels
        self.modalities = tuple(modality for modality in MODALITIES if modality in chosen)
        self._corpus = corpus
        self._crop = crop
        self._bad_clips: Policy = bad_clips
        self._cache = cache
        self._workers = workers or min(os.cpu_count() or 1, 8)
        self._limits = limits
        self._clips: dict[Place, ClipStore] = {}
        self._kept: dict[str, list[int]] = {
            split: list(range(len(corpus.utterances(split)))) for split in SPLITS
        }
        self._rows = {
            (modality, split): [
                (utterance.identity, _clip(utterance, modality))
                for utterance in corpus.utterances(split)
            ]
            for modality in self.modalities[1:]
            for split in SPLITS
        }
        self._check_clips()
        self._encoding = RawEncoding(
            {
                modality: Pretrained.parse(chosen[modality], (revisions or {}).get(modality))
                for modality in self.modalities
            },
            len(corpus.labels),
            speakers=corpus.speakers,
            max_text_tokens=max_text_tokens,
            max_seconds=max_seconds,
            crop=crop,
        )
        self.feature_size = self._encoding.feature_size
        self.description: dict[str, JSON] = {
            "kind": "raw",
            "corpus": corpus.name,
            "annotations": _digest(corpus),
            "encoders": {
                modality: encoder.description
                for modality, encoder in self._encoding.encoders.items()
            },
            "max_text_tokens": max_text_tokens,
            "max_seconds": max_seconds,
            "crop": crop,
            "bad_clips": bad_clips,
        }

    def describe(self, modalities: Sequence[str]) -> dict[str, JSON]:
        """What stages that see these modalities depend on; after `prepare`."""
        described: dict[str, JSON] = {
            "kind": "raw",
            "corpus": self.name,
            "annotations": _digest(self._corpus, words="text" in modalities),
            "feature_size": self.feature_size,
            "encoders": {
                modality: self._encoding.encoders[modality].description for modality in modalities
            },
            "clips": {
                modality: [self._store(modality, split).digest for split in SPLITS]
                for modality in modalities
                if modality != "text"
            },
        }
        if "text" in modalities:
            described["max_text_tokens"] = self._encoding.max_text_tokens
            if not self._encoding.ask:
                described["prompt"] = False
        if left_out := self._left_out():
            described["left_out"] = left_out
        return described

    def targets(self, split: str) -> Tensor:
        """The labels of a split: int64, ``[N]``."""
        rows = self._corpus.utterances(split)
        return torch.tensor([rows[row].label for row in self._kept[split]])

    def without_prompt(self) -> "RawSource":
        """The same corpus and the same clips; a text ends with the words of its last speaker."""
        other = copy.copy(self)
        other._encoding = self._encoding.without_prompt()
        return other

    def lines(self, split: str) -> list[Line]:
        """Who says what in a split."""
        lines = [
            Line(
                dialogue.identity,
                row.identity,
                row.name or f"speaker {row.speaker + 1}",
                row.text,
            )
            for dialogue in self._corpus.splits[split]
            for row in dialogue.utterances
        ]
        return [lines[row] for row in self._kept[split]]

    def keep_encoding(self, folder: Path) -> dict[str, JSON]:
        """Keep configurations, tokenizer and processors."""
        return self._encoding.keep(folder)

    def prepare(self, folder: Path) -> None:
        """Load every encoder once, so that a bad one is found before any work; decode the clips.

        Args:
            folder: The run folder; ``clips`` in it receives the ledger and, without a shared cache,
                the clips.

        Raises:
            InputError: An encoder cannot be loaded, a split has no clip that can be decoded, or
                there is a bad clip and there may be none.
        """
        # What the trial loads draw at random must not move the seed of the run.
        with torch.random.fork_rng(devices=[]):
            for modality in self.modalities:
                self.encoder(modality)
        if not self._rows:
            return
        cache = Cache(self._cache or folder / CLIPS)
        path = folder / CLIPS / LEDGER
        path.parent.mkdir(parents=True, exist_ok=True)
        with Crew(self._workers, self._limits) as crew:
            for place, rows in self._rows.items():
                modality, split = place
                self._clips[place] = decode_clips(
                    rows,
                    self._encoding.decoding(modality),
                    cache,
                    crew,
                    title=f"{self.title} {modality}, {split}",
                    label=modality,
                    settings=self._encoding.preprocessing(modality),
                )
                ledger.write(path, self._bad_clips, self._clips, self._rows)
        if self._cache is None:
            cache.keep_only([shard for store in self._clips.values() for shard in store.shards])
        self._settle(path)

    def dataset(self, modality: str, split: str) -> Dataset:
        """The encoder inputs of one modality in one split; audio and visual after `prepare`."""
        if modality == "text":
            whole = self._encoding.texts(self._corpus.splits[split])
        else:
            whole = self._encoding.clips(modality, self._store(modality, split))
        kept = self._kept[split]
        return whole if len(kept) == len(whole) else _Selection(whole, kept)

    def encoder(self, modality: str) -> nn.Module:
        """A fresh encoder; what it initialises at random follows torch's global seed."""
        return self._encoding.encoder(modality)

    def optimisation(self, phase: Phase) -> Optimisation | None:
        """``None``: pretrained encoders are trained with the recipe's numbers."""
        return None

    def _store(self, modality: str, split: str) -> ClipStore:
        if (modality, split) not in self._clips:
            raise RuntimeError(f"{modality}, {split}: call prepare first")
        return self._clips[modality, split]

    def _left_out(self) -> dict[str, JSON]:
        """The utterances of each split that are left out, of splits that are not whole."""
        return {
            split: [row.identity for number, row in enumerate(rows) if number not in kept]
            for split in SPLITS
            if len(kept := {*self._kept[split]}) < len(rows := self._corpus.utterances(split))
        }

    def _settle(self, path: Path) -> None:
        """Do with bad clips what there is to do.

        Raises:
            InputError: There may be none, or they leave nothing of a split.
        """
        lost = [(place, fault) for place, store in self._clips.items() for fault in store.lost]
        for (modality, split), store in self._clips.items():
            if len(store.lost) == len(store):
                fault = store.lost[0]
                raise InputError(
                    f"{self.title} {modality}, {split}: expected clips that can be decoded, got "
                    f"none in {len(store)} ({fault.utterance}: {fault.reason}); check the folder "
                    f"of the corpus, and see {path}"
                )
        if lost and self._bad_clips == "fail":
            (modality, split), fault = lost[0]
            raise InputError(
                f"{self.title}: expected clips that can all be decoded, got {len(lost)} that "
                f"cannot ({modality}, {split}, {fault.utterance}: {fault.reason}); mend them, or "
                f"mask or skip them; {path} lists all"
            )
        if lost:
            done = {"mask": "masked", "skip": "skipped"}[self._bad_clips]
            print(
                f"{self.title}: {len(lost)} clips cannot be had, and are {done}; {path} lists them",
                file=sys.stderr,
                flush=True,
            )
        if self._bad_clips == "skip":
            for split in SPLITS:
                gone = {fault.row for place, fault in lost if place[1] == split}
                rows = range(len(self._corpus.utterances(split)))
                self._kept[split] = [row for row in rows if row not in gone]
                if not self._kept[split]:
                    raise InputError(
                        f"{self.title}, {split}: expected utterances with all their clips, got "
                        f"none in {len(rows)}; mask bad clips instead, or use fewer modalities"
                    )

    def _check_clips(self) -> None:
        for (modality, split), rows in self._rows.items():
            missing = [identity for identity, clip in rows if clip is None]
            if len(missing) == len(rows) or (missing and self._bad_clips == "fail"):
                none = "none" if len(missing) == len(rows) else f"no file for {len(missing)}"
                raise InputError(
                    f"{self.title} {modality}, {split}: expected clips in the folder of the "
                    f"corpus, got {none} for {len(rows)} utterances such as {missing[0]}; "
                    f"unpack the corpus, or leave {modality} out"
                )
            if (
                self._crop
                and modality == "visual"
                and not any(clip and clip.side for _, clip in rows)
            ):
                raise InputError(
                    f"{self.title} visual, {split}: expected films that two speakers share, to see "
                    "the half of each, got none; leave the pictures whole"
                )


class _Selection:
    """Some rows of a dataset."""

    def __init__(self, whole: Dataset, kept: Sequence[int]) -> None:
        self._whole = whole
        self._kept = kept

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._kept)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """Collate these rows, in this order."""
        return self._whole[[self._kept[row] for row in rows]]


def _clip(utterance: Utterance, modality: str) -> Clip | None:
    return utterance.audio if modality == "audio" else utterance.visual


def _check_options(
    encoders: Mapping[str, str],
    revisions: Mapping[str, str],
    max_seconds: float,
    workers: int | None,
) -> None:
    unknown = sorted({*encoders, *revisions} - {*MODALITIES})
    if unknown or "text" not in encoders:
        raise InputError(
            f"encoders: expected text, and audio or visual besides, got "
            f"{', '.join(sorted({*encoders, *revisions})) or 'none'}; name one for each modality"
        )
    if not (math.isfinite(max_seconds) and max_seconds > 0):
        raise InputError(
            f"max_seconds: expected a finite number > 0, got {max_seconds}; 30 suits both corpora"
        )
    if workers is not None and workers < 1:
        raise InputError(f"workers: expected at least 1, got {workers}; leave it out for a default")


def _digest(corpus: Corpus, *, words: bool = True) -> str:
    """The SHA-256 of the annotations: labels and, if asked for, who says what."""
    rows = [
        [split, dialogue.identity, row.identity, row.label]
        + ([row.text, row.speaker] if words else [])
        for split in SPLITS
        for dialogue in corpus.splits[split]
        for row in dialogue.utterances
    ]
    text = json.dumps([corpus.name, corpus.labels, rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
