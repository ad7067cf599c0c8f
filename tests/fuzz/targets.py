"""Every parser of the project, each with whole files to start from and with what it may say.

A target takes the bytes of one file, which it puts where the parser looks for it. The parser either
understands them or refuses them in one line; it opens nothing outside of its folder, and takes
little time and memory.
"""

import io
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from examples.erc import dialogue_file, feature_folder, released, results
from examples.erc.artifacts import DamageError, read_record, sha256, write_record
from examples.erc.cache import SOURCES, Cache
from examples.erc.checkpoint import Checkpoints
from examples.erc.crew import Decoding, Limits, Result, _LostError, _Process
from examples.erc.dialogue import Clip
from examples.erc.errors import InputError
from examples.erc.media import ClipError
from examples.erc.media_length import measure
from examples.erc.pretrained import Pretrained
from examples.erc.results import Results
from examples.erc.table import read_table
from examples.iemocap import corpus as iemocap
from examples.iemocap.release import read_release
from examples.meld import corpus as meld
from examples.synthetic.manifest import NAME, Manifest
from examples.synthetic.script import Size
from telme_kd.errors import CheckpointError
from telme_kd.interop import load_released_fusion
from tests.examples.conftest import make_features, write_files
from tests.examples.test_hostile_annotations import (
    MELD_HEADER,
    iemocap_tables,
    iemocap_texts,
)
from tests.examples.test_hostile_annotations import meld as meld_files
from tests.helpers.damage import astray, audited
from tests.helpers.mutations import make_film

LONGEST = 10.0
"""Seconds of processor time that a file may take."""

LARGEST = 1 << 30
"""Bytes that memory may grow by."""


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        seeds: Files that it understands.
        parse: Reads such a file, given the folder around it and its bytes.
        around: The other files that it needs, by name.
        refusals: What it may raise.
        json: Whether the files are JSON, to be damaged as such besides.
        stray: Whether what others read for it need not lie in the folder.
    """

    seeds: Callable[[], list[bytes]]
    parse: Callable[[Path, bytes], object]
    around: Callable[[], Mapping[str, bytes]] = dict
    refusals: tuple[type[Exception], ...] = (InputError,)
    json: bool = False
    stray: bool = False


class Room:
    """A folder in which a target is tried again and again.

    Args:
        target: The target.

    Attributes:
        target: The target.
        seeds: Its files.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.seeds = target.seeds()
        self._folder = Path(tempfile.mkdtemp())
        self._root = self._folder / "root"
        (self._folder / "outside").mkdir()
        (self._folder / "outside" / "secret.mp4").write_bytes(b"secret")
        for name, data in target.around().items():
            put(self._root, name, data)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self._folder)

    def attempt(self, data: bytes) -> Exception | None:
        """Read a file.

        Returns:
            How it was refused; ``None``: it was not.

        Raises:
            AssertionError: A promise was broken.
        """
        self._root.mkdir(exist_ok=True)
        before, held = time.process_time(), _memory()
        refusal = None
        with audited() as paths:
            try:
                self.target.parse(self._root, data)
            except self.target.refusals as error:
                refusal = error
        if refusal is not None:
            (line,) = str(refusal).splitlines()
            assert 0 < len(line) < 4000, line
        lost = [] if self.target.stray else astray(paths, self._root)
        assert not lost, lost
        assert (self._folder / "outside" / "secret.mp4").read_bytes() == b"secret"
        assert time.process_time() - before < LONGEST
        assert _memory() - held < LARGEST
        return refusal


def _memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def put(root: Path, name: str, data: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def parse_table(root: Path, data: bytes) -> None:
    for row in read_table(put(root, "table.csv", data), ["Utterance", "Dialogue_ID"]):
        assert None not in row.cells.values()
        row.text("Utterance")
        row.integer("Dialogue_ID")
        row.seconds("Dialogue_ID")
        row.index("Dialogue_ID", ["0", "1"])


def parse_meld(root: Path, data: bytes) -> None:
    put(root, "train_sent_emo.csv", data)
    for split, dialogues in meld.read(root).splits.items():
        assert dialogues, split


def parse_iemocap_table(root: Path, data: bytes) -> None:
    put(root, "IEMOCAP_train.csv", data)
    _check_iemocap(iemocap.read(root).splits["train"], root)


def parse_transcription(root: Path, data: bytes) -> None:
    put(root, "Session1/dialog/transcriptions/Ses01F_impro01.txt", data)
    read_release(root)
    _check_iemocap(iemocap.read(root).splits["train"], root)


def parse_evaluation(root: Path, data: bytes) -> None:
    put(root, "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", data)
    read_release(root)
    _check_iemocap(iemocap.read(root).splits["train"], root)


def _check_iemocap(dialogues: Any, root: Path) -> None:
    for dialogue in dialogues:
        for row in dialogue.utterances:
            assert row.text
            for clip in (row.audio, row.visual):
                assert clip is None or clip.path.is_relative_to(root.resolve())


DIALOGUES = [
    {"speaker": "Ada", "text": "Well.", "id": "0", "clip": "a.mp4", "side": "left"},
    {"speaker": "Bo", "text": "Yes?", "audio": {"file": "a.wav", "start": 0.5, "end": 1.5}},
]
DIALOGUE_TABLE = (
    b"Speaker,Utterance,Dialogue_ID,Utterance_ID,Clip,Clip_Start,Clip_End,Side\n"
    b'Ada,"Well, well.",0,0,a.mp4,0.5,1.5,left\nBo,Yes?,0,1,,,,\n'
)


def parse_dialogues(name: str) -> Callable[[Path, bytes], None]:
    def parse(root: Path, data: bytes) -> None:
        for dialogue in dialogue_file.read(put(root, name, data), root).dialogues:
            for said in dialogue:
                for clip in (said.audio, said.visual):
                    assert clip is None or clip.path.is_relative_to(root.resolve())

    return parse


def feature_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), make_features())
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def parse_features(name: str) -> Callable[[Path, bytes], None]:
    def parse(root: Path, data: bytes) -> None:
        put(root, name, data)
        found = feature_folder.read(root, "meld")
        assert sum(len(rows) for rows in found.rows.values()) == len(found.label)
        for arrays in found.modalities.values():
            for array in arrays:
                assert np.isfinite(array.values[array.there]).all()

    return parse


def stored(array: np.ndarray[Any, Any], *, packed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, label=array)
    return buffer.getvalue()


def sealed_record() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage.json"
        write_record(path, {"fingerprint": "settings", "sha256": "0" * 64, "rate": [0.1, "ü"]})
        return path.read_bytes()


def parse_record(root: Path, data: bytes) -> None:
    read_record(put(root, "stage.json", data))


def checkpoint_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(Path(folder), "settings", 1, "a stage")
        store.save(1, 0, {"step": 1, "weights": torch.ones(3)})
        store.save(2, 0, {"step": 2, "weights": torch.ones(3)})
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def parse_checkpoint(suffix: str) -> Callable[[Path, bytes], None]:
    def parse(root: Path, data: bytes) -> None:
        path = put(root, f"step-000000002-00000{suffix}", data)
        store = Checkpoints(root, "settings", 1, "a stage")
        newest = store.newest()
        assert newest is not None
        state = store.load(newest)
        assert state["step"] == (2 if newest.stem == path.stem else 1)
        assert state["weights"].eq(1).all()

    return parse


def whole_shard() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        shard = Cache(Path(folder)).put("audio-1", {"values": np.arange(9)}, {"rows": 3})
        return [shard.path.read_bytes()]


def parse_shard(root: Path, data: bytes) -> None:
    """A shard whose name fits, as nobody but a forger gives it one."""
    path = put(root, f"audio-1.{sha256(data)}.safetensors", data)
    found = Cache(root).find("audio-1")
    assert (found is None) == (not path.exists())
    path.unlink(missing_ok=True)


def parse_sources(root: Path, data: bytes) -> None:
    put(root, SOURCES, data)
    clip = put(root, "clip", b"content")
    assert Cache(root).digest(clip) == sha256(b"content")


def whole_sources() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SOURCES
        write_record(path, {"/clips/one.mp4": [7, 1, 2, "0" * 64]})
        return [path.read_bytes()]


def whole_manifest() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "corpus"
        manifest = Manifest(root, "meld", 0, Size())
        manifest.begin()
        unfinished = (root / NAME).read_bytes()
        manifest.finish([put(root, "a/b.csv", b"content")])
        return [(root / NAME).read_bytes(), unfinished]


def parse_manifest(root: Path, data: bytes) -> None:
    put(root, "a/b.csv", b"content")
    put(root, NAME, data)
    manifest = Manifest(root, "meld", 0, Size())
    if not manifest.is_finished():
        manifest.begin()


def fabricated() -> list[bytes]:
    path = Path(__file__).parents[1] / "examples" / "erc" / "results.json"
    return [path.read_bytes()]


def parse_results(root: Path, data: bytes) -> None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(document, dict):
        assert isinstance(results.read(document), Results)


def states() -> dict[str, torch.Tensor]:
    return {
        "multihead_attn.in_proj_weight": torch.zeros(12, 4),
        "multihead_attn.in_proj_bias": torch.zeros(12),
        "multihead_attn.out_proj.weight": torch.zeros(4, 4),
        "multihead_attn.out_proj.bias": torch.zeros(4),
        "AV_LayerNorm.weight": torch.ones(4),
        "AV_LayerNorm.bias": torch.zeros(4),
        "W_hav.weight": torch.zeros(3, 7),
        "W_hav.bias": torch.zeros(3),
        "W_av.weight": torch.zeros(3, 4),
        "W_av.bias": torch.zeros(3),
        "LayerNorm.weight": torch.ones(3),
        "LayerNorm.bias": torch.zeros(3),
        "W.weight": torch.zeros(2, 3),
        "W.bias": torch.zeros(2),
    }


def saved_states() -> list[bytes]:
    files = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(states(), buffer, _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    return files


def parse_weights(suffix: str) -> Callable[[Path, bytes], None]:
    def parse(root: Path, data: bytes) -> None:
        state = released.read(put(root, f"weights{suffix}", data))
        load_released_fusion(state, num_heads=2, threshold=0.1)

    return parse


CONFIGURATION = {
    "model_type": "roberta", "architectures": ["RobertaModel"], "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30,
    "max_position_embeddings": 20, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "dtype": "float32",
}  # fmt: skip


def parse_configuration(root: Path, data: bytes) -> None:
    put(root, "config.json", data)
    assert Pretrained(str(root)).hidden_size >= 1


class _Said(_Process):
    """The other end of a process that says what it is told to, and no more."""

    def __init__(self, data: bytes) -> None:
        self._said = io.BytesIO(data)

    def _tell(self, order: Mapping[str, Any]) -> None:
        pass

    def _read(self, size: int, patience: object) -> bytearray:
        data = bytearray(self._said.read(size))
        if len(data) < size:
            raise _LostError(Result(None, "broken", "it is dead"))
        return data


def messages() -> list[bytes]:
    def message(header: Mapping[str, Any], values: bytes = b"") -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(4, "little") + text + values

    whole = {"position": 0, "damaged": 0, "dtype": "<i2", "shape": [2, 2]}
    return [
        message(whole, bytes(8))
        + message({"position": 1, "broken": "no film"})
        + message({"done": True}),
        message({"fatal": "it needs more memory than a clip may"}),
        message({"broken": "no stream"}),
    ]


def parse_messages(root: Path, data: bytes) -> None:
    clips = [Clip(Path("clip"), number, number + 1.0) for number in range(2)]
    decoding = Decoding("module:name", {}, lambda values: values)
    for position, result in _Said(data).run(clips, decoding, Limits()):
        assert 0 <= position < len(clips)
        assert (result.values is None) == (result.kind == "broken")


@cache
def films() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [make_film(Path(folder) / f"film.{suffix}") for suffix in ("mp4", "avi", "mkv")]
        return [path.read_bytes() for path in paths]


def parse_film(root: Path, data: bytes) -> None:
    length = measure(put(root, "film", data), ["audio", "visual"])
    assert length.seconds > 0
    assert length.reached >= 0


TARGETS = {
    "table": Target(
        lambda: [b'Utterance,Dialogue_ID\nHello,0\n"a, b",1\n', MELD_HEADER.encode() + b"1,\n"],
        parse_table,
    ),
    "meld": Target(lambda: [meld_files()["train_sent_emo.csv"]], parse_meld, meld_files),
    "iemocap-table": Target(
        lambda: [iemocap_tables()["IEMOCAP_train.csv"]], parse_iemocap_table, iemocap_tables
    ),
    "iemocap-transcription": Target(
        lambda: [iemocap_texts()["Session1/dialog/transcriptions/Ses01F_impro01.txt"]],
        parse_transcription,
        iemocap_texts,
    ),
    "iemocap-evaluation": Target(
        lambda: [iemocap_texts()["Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"]],
        parse_evaluation,
        iemocap_texts,
    ),
    "dialogues-table": Target(
        lambda: [DIALOGUE_TABLE], parse_dialogues("said.csv"), lambda: {"a.mp4": b"", "a.wav": b""}
    ),
    "dialogues-json": Target(
        lambda: [
            json.dumps(document).encode()
            for document in (DIALOGUES, [{"id": "a", "utterances": DIALOGUES}])
        ],
        parse_dialogues("said.json"),
        lambda: {"a.mp4": b"", "a.wav": b""},
        json=True,
    ),
    "features-meta": Target(
        lambda: [feature_files()["meta.json"]],
        parse_features("meta.json"),
        feature_files,
        json=True,
    ),
    "features-arrays": Target(
        lambda: [feature_files()["features.npz"], stored(np.zeros(9), packed=True)],
        parse_features("features.npz"),
        feature_files,
    ),
    "record": Target(lambda: [sealed_record()], parse_record, refusals=(DamageError,), json=True),
    "checkpoint-record": Target(
        lambda: [checkpoint_files()["step-000000002-00000.json"]],
        parse_checkpoint(".json"),
        checkpoint_files,
        refusals=(),
        json=True,
    ),
    "checkpoint-tensors": Target(
        lambda: [checkpoint_files()["step-000000002-00000.safetensors"]],
        parse_checkpoint(".safetensors"),
        checkpoint_files,
        refusals=(),
    ),
    "shard": Target(whole_shard, parse_shard, refusals=()),
    "sources": Target(whole_sources, parse_sources, refusals=(), json=True),
    "synthetic-manifest": Target(whole_manifest, parse_manifest, json=True),
    "results": Target(fabricated, parse_results, json=True),
    "weights-torch": Target(
        saved_states, parse_weights(".bin"), refusals=(InputError, CheckpointError)
    ),
    "weights-safetensors": Target(
        lambda: [save_tensors(states())],
        parse_weights(".safetensors"),
        refusals=(InputError, CheckpointError),
    ),
    "encoder-configuration": Target(
        lambda: [json.dumps(CONFIGURATION).encode()],
        parse_configuration,
        json=True,
        stray=True,
    ),
    "decoder-messages": Target(messages, parse_messages, refusals=(_LostError,)),
    "film": Target(films, parse_film, refusals=(ClipError,), stray=True),
}
