import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from examples.erc.audio import AudioEncoder
from examples.erc.errors import InputError
from examples.erc.pretrained import Pretrained
from examples.erc.released import load_student, load_text, read
from examples.erc.text import Prompter, TextEncoder
from examples.erc.visual import VisualEncoder
from telme_kd.interop import load_released_fusion
from tests.helpers.golden import Case, cases

WIDTH = 8
CLASSES = 3


@pytest.fixture
def text(tiny_encoders: dict[str, str]) -> TextEncoder:
    encoder = Pretrained(tiny_encoders["text"])
    return TextEncoder(encoder, Prompter(encoder, 2, 40), CLASSES, WIDTH)


@pytest.fixture
def audio(tiny_encoders: dict[str, str]) -> AudioEncoder:
    return AudioEncoder(Pretrained(tiny_encoders["audio"]), CLASSES, WIDTH)


@pytest.fixture
def visual(tiny_encoders: dict[str, str]) -> VisualEncoder:
    return VisualEncoder(Pretrained(tiny_encoders["visual"]), CLASSES, WIDTH)


def released_teacher(folder: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module as transformers made it when the code was released, and its state dict."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(4)
    config = RobertaConfig.from_pretrained(folder)
    body = RobertaModel(config)
    body.resize_token_embeddings(config.vocab_size + 9)
    parts = nn.ModuleDict(
        {"text_model": body, "W": nn.Linear(16, WIDTH), "classifier": nn.Linear(WIDTH, CLASSES)}
    ).eval()
    state = dict(parts.state_dict())
    assert any(name.startswith("text_model.pooler.") for name in state)
    positions = torch.arange(config.max_position_embeddings)[None]
    return parts, {**state, "text_model.embeddings.position_ids": positions}


def released_student(kind: str, folder: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(5)
    body = getattr(transformers, kind)(transformers.AutoConfig.from_pretrained(folder))
    parts = nn.ModuleDict({"model": body, "W": nn.Linear(WIDTH, CLASSES)}).eval()
    return parts, dict(parts.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_released_teacher_computes_the_same_here(
    text: TextEncoder, tiny_encoders: dict[str, str], tmp_path: Path, prefix: str
) -> None:
    parts, state = released_teacher(tiny_encoders["text"])
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "teacher.bin")
    load_text(text, tmp_path / "teacher.bin")
    ids = torch.tensor([[1, 1, 0, 7, 8, 4], [0, 9, 10, 11, 2, 4]])
    mask = (ids != 1).long()
    with torch.no_grad():
        hidden = parts["text_model"](ids, attention_mask=mask).last_hidden_state[:, -1]
        features = parts["W"](hidden)
        output = text.eval()(ids, mask)
        assert torch.allclose(output.features, features, atol=1e-6)
        assert torch.allclose(output.logits, parts["classifier"](features), atol=1e-6)


def test_a_released_audio_student_has_its_weights_here(
    audio: AudioEncoder, tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    parts, state = released_student("Data2VecAudioModel", tiny_encoders["audio"])
    torch.save(state, tmp_path / "total_student.bin")
    load_student(audio, tmp_path / "total_student.bin")
    for name, value in parts["model"].state_dict().items():
        assert torch.equal(audio.body.state_dict()[name], value)
    assert torch.equal(audio.head.classifier.weight, parts["W"].weight)
    state.pop("model.masked_spec_embed")
    torch.save(state, tmp_path / "total_student.bin")
    load_student(audio, tmp_path / "total_student.bin")


def test_a_released_visual_student_computes_the_same_here(
    visual: VisualEncoder, tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    parts, state = released_student("TimesformerModel", tiny_encoders["visual"])
    save_file(state, tmp_path / "total_student.safetensors")
    load_student(visual, tmp_path / "total_student.safetensors")
    frames = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = parts["model"](frames).last_hidden_state[:, 0]
        output = visual.eval()(frames, torch.tensor([True, True]))
        assert torch.allclose(output.logits, parts["W"](hidden), atol=1e-6)


def test_every_fault_is_listed_and_nothing_is_changed(
    text: TextEncoder, tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    _, state = released_teacher(tiny_encoders["text"])
    before = {name: value.clone() for name, value in text.state_dict().items()}
    del state["W.bias"], state["classifier.weight"]
    state["W.weight"] = torch.zeros(5, 16)
    state["something.else"] = torch.zeros(1)
    state["classifier.bias"][1] = torch.nan
    torch.save(state, tmp_path / "teacher.bin")
    with pytest.raises(InputError) as caught:
        load_text(text, tmp_path / "teacher.bin")
    for fault in (
        "missing head.classifier.weight",
        "missing head.projection.bias",
        "unexpected something.else",
        "head.projection.weight: expected (8, 16), got (5, 16)",
        "head.classifier.bias holds NaN or infinity",
    ):
        assert fault in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())


def test_a_student_is_no_teacher(
    visual: VisualEncoder, tiny_encoders: dict[str, str], tmp_path: Path
) -> None:
    _, state = released_teacher(tiny_encoders["text"])
    torch.save(state, tmp_path / "teacher.bin")
    with pytest.raises(InputError, match=r"weights of the released student .* and \d+ more; choo"):
        load_student(visual, tmp_path / "teacher.bin")


@pytest.mark.parametrize("golden", cases("released_fusion"))
def test_read_serves_the_fusion_head(golden: Case, tmp_path: Path) -> None:
    state = {
        name.removeprefix("state/"): torch.from_numpy(values)
        for name, values in golden.items()
        if name.startswith("state/")
    }
    torch.save(state, tmp_path / "total_fusion.bin")
    fusion = load_released_fusion(
        read(tmp_path / "total_fusion.bin"),
        num_heads=int(golden["num_heads"]),
        threshold=float(golden["threshold"]),
    )
    inputs = [torch.from_numpy(golden[name]) for name in ("text", "visual", "acoustic")]
    assert torch.allclose(fusion(*inputs), torch.from_numpy(golden["logits"]), atol=1e-10)


class Touch:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.path}",)


class Evaluate(Touch):
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return eval, (f"open({str(self.path)!r}, 'w')",)


def corpus(marker: Path) -> Mapping[str, Callable[[Path], object]]:
    """Files that run code if they are read carelessly, and some that are merely broken."""
    evil = Touch(marker)

    def rewritten(path: Path) -> None:
        torch.save({"a": torch.zeros(2)}, path)
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, pickle.dumps(evil) if name.endswith("data.pkl") else data)

    return {
        "pickle": lambda path: path.write_bytes(pickle.dumps(evil)),
        "old pickle": lambda path: path.write_bytes(pickle.dumps({"a": evil}, protocol=0)),
        "eval": lambda path: path.write_bytes(pickle.dumps(Evaluate(marker))),
        "torch": lambda path: torch.save(evil, path),
        "torch, in a state dict": lambda path: torch.save({"a": torch.zeros(2), "b": evil}, path),
        "torch, as a key": lambda path: torch.save({evil: torch.zeros(2)}, path),
        "torch, legacy": lambda path: torch.save(
            {"a": evil}, path, _use_new_zipfile_serialization=False
        ),
        "torch, rewritten": rewritten,
        "a module": lambda path: torch.save(nn.Linear(2, 2), path),
        "not only tensors": lambda path: torch.save({"a": torch.zeros(2), "epoch": 3}, path),
        "a tensor": lambda path: torch.save(torch.zeros(2), path),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "nothing": lambda path: None,
    }


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("name", corpus(Path()))
def test_no_file_runs_code(tmp_path: Path, name: str, suffix: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"weights{suffix}"
    corpus(marker)[name](path)
    with pytest.raises(InputError, match=rf"weights{suffix}: expected a state dict"):
        read(path)
    assert not marker.exists()


def test_the_corpus_does_run_code_if_read_carelessly(tmp_path: Path) -> None:
    """Or the test above would not show anything."""
    marker = tmp_path / "marker"
    for name in ("pickle", "torch", "torch, in a state dict", "torch, legacy", "torch, rewritten"):
        path = tmp_path / "weights.bin"
        corpus(marker)[name](path)
        try:
            torch.load(path, weights_only=False)
        except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError):
            pickle.loads(path.read_bytes())
        assert marker.exists(), name
        marker.unlink()


def test_a_pytorch_whose_unpickler_has_faults_reads_safetensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"a": torch.zeros(2)}
    torch.save(state, tmp_path / "weights.bin")
    save_file(state, tmp_path / "weights.safetensors")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    assert read(tmp_path / "weights.safetensors").keys() == {"a"}
    with pytest.raises(InputError, match=r"before 2\.10 .* upgrade, or convert to safetensors"):
        read(tmp_path / "weights.bin")


def test_every_truncation_of_a_file_is_an_input_error(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0)}, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    for length in range(0, len(whole) - 1, 29):
        (tmp_path / "part.bin").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read(tmp_path / "part.bin")
