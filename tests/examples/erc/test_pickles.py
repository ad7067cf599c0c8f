"""No file that the pipelines read is executed, whatever it is called and wherever it lies."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from examples.erc import feature_folder
from examples.erc.artifacts import OUTPUTS, STAGE, WEIGHTS, DamageError, read_record, sha256
from examples.erc.audio import AudioEncoder
from examples.erc.cache import SOURCES, Cache
from examples.erc.checkpoint import Checkpoints
from examples.erc.clips import ClipStore
from examples.erc.errors import InputError
from examples.erc.pretrained import Pretrained, load_body
from examples.erc.released import load_student, read
from examples.synthetic.manifest import NAME, Manifest
from examples.synthetic.script import Size
from tests.examples.conftest import make_features, write_files
from tests.helpers import pickles
from tests.helpers.small_stores import obtain_stage, trained

SHARD = {"values": np.arange(6, dtype=np.int16), "offsets": np.array([0, 6])}


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "executed"


@pytest.fixture(scope="module")
def corpus(marker: Path) -> dict[str, bytes]:
    return pickles.corpus(marker)


@pytest.fixture(autouse=True)
def canary(marker: Path) -> Iterator[None]:
    """Nothing was executed, before or in the test."""
    assert not marker.exists()
    yield
    assert not marker.exists()


def test_every_file_of_the_corpus_runs_code_if_it_is_read_carelessly(
    corpus: dict[str, bytes], marker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(corpus) > 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        for name, data in corpus.items():
            pickles.read_carelessly(data)
            assert marker.exists(), name
            marker.unlink()


def refuse(path: Path, data: bytes, load: Callable[[], object], refusal: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    with pytest.raises(InputError, match=refusal) as caught:
        load()
    (line,) = str(caught.value).splitlines()
    assert len(line) < 1000


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pt", ".pkl", ".npz", ""])
def test_weights(corpus: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"teacher{suffix}"
    for data in corpus.values():
        refuse(path, data, lambda: read(path), "expected a state dict")


def test_a_released_student_leaves_the_encoder_as_it_is(
    corpus: dict[str, bytes], tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    encoder = AudioEncoder(Pretrained(tiny_encoders["audio"]), 3, 8)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    path = tmp_path / "total_student.bin"
    for data in corpus.values():
        refuse(path, data, lambda: load_student(encoder, path), "expected a state dict")
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"]
)
def test_encoders(
    corpus: dict[str, bytes], tiny_encoders: dict[str, str], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_encoders["text"], tmp_path / "encoder"))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()

    def load() -> None:
        encoder = Pretrained(str(folder))
        load_body(encoder) if name != "tokenizer.json" else encoder.load("AutoTokenizer")

    for data in corpus.values():
        refuse(folder / name, data, load, "expected an encoder for Auto")


@pytest.mark.parametrize("name", ["features.npz", "meta.json"])
def test_feature_folders(corpus: dict[str, bytes], tmp_path: Path, name: str) -> None:
    folder = write_files(tmp_path, make_features())
    for data in corpus.values():
        refuse(folder / name, data, lambda: feature_folder.read(folder, "meld"), "expected")


def test_the_manifest_of_a_synthetic_corpus(corpus: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for data in corpus.values():
        refuse(root / NAME, data, lambda: Manifest(root, "meld", 0, Size()), "damaged file")


@pytest.mark.parametrize("name", [WEIGHTS, OUTPUTS, STAGE])
def test_stages_are_computed_again(corpus: dict[str, bytes], tmp_path: Path, name: str) -> None:
    stage = obtain_stage(tmp_path / "stage", {}, trained)
    whole = (stage.folder / name).read_bytes()
    for data in corpus.values():
        (stage.folder / name).write_bytes(data)
        assert obtain_stage(stage.folder, {}, trained) == stage
        assert (stage.folder / name).read_bytes() == whole


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_checkpoints_are_passed_over(corpus: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    checkpoints = Checkpoints(tmp_path, "settings", 1, "a stage")
    checkpoints.save(1, 0, {"step": 1})
    checkpoints.save(2, 0, {"step": 2})
    path = tmp_path / f"step-000000002-00000{suffix}"
    for data in corpus.values():
        path.write_bytes(data)
        newest = checkpoints.newest()
        assert newest is not None
        assert checkpoints.load(newest) == {"step": 1}
        with suppress(DamageError):
            read_record(path)
            raise AssertionError("a record")


def test_shards_are_removed_even_if_their_name_fits(
    corpus: dict[str, bytes], tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    for data in corpus.values():
        path = tmp_path / f"audio-1.{sha256(data)}.safetensors"
        path.write_bytes(data)
        assert cache.find("audio-1") is None
        assert not path.exists()
        (tmp_path / SOURCES).write_bytes(data)
        assert Cache(tmp_path).find("audio-1") is None
    shard = cache.put("audio-1", SHARD, {"rows": 1, "faults": []})
    values = ClipStore([shard], ["utterance"])[0]
    assert values is not None
    assert values.tolist() == list(range(6))
