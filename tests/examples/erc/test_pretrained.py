import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.erc.errors import InputError
from examples.erc.pretrained import Head, Pretrained, load_body


@pytest.fixture
def copy(tiny_encoders: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoders["text"], tmp_path / "copy"))


def test_a_name_that_is_neither_here_nor_on_the_hub_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(InputError, match=r"nowhere: expected an encoder .*; check the name") as got:
        _ = Pretrained(str(tmp_path / "nowhere")).config
    assert "\n" not in str(got.value)


def test_weights_are_float32_whatever_the_checkpoint_holds(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halves, copy / "model.safetensors", metadata={"format": "pt"})

    body = load_body(Pretrained(str(copy)))

    assert {parameter.dtype for parameter in body.parameters()} == {torch.float32}


def test_there_is_no_pooling_layer(copy: Path) -> None:
    assert load_body(Pretrained(str(copy))).pooler is None


def test_incomplete_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1" not in name}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match=r"expected the weights of a whole RobertaModel, got none"):
        load_body(Pretrained(str(copy)))


def test_weights_that_are_not_finite_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][3] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match=r"expected finite weights, .*layer\.0\.output\.dense"):
        load_body(Pretrained(str(copy)))


def test_a_truncated_checkpoint_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(InputError, match="expected an encoder for AutoModel"):
        load_body(Pretrained(str(copy)))


def test_pickled_tensors_are_read_where_there_is_no_other_file(copy: Path) -> None:
    expected = load_body(Pretrained(str(copy))).state_dict()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()

    loaded = load_body(Pretrained(str(copy))).state_dict()

    assert all(torch.equal(loaded[name], values) for name, values in expected.items())


def test_a_pickle_that_would_run_code_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"weights": _Trap(tmp_path / "sprung")}, copy / "pytorch_model.bin")

    with pytest.raises(InputError, match="expected an encoder for AutoModel"):
        load_body(Pretrained(str(copy)))

    assert not (tmp_path / "sprung").exists()


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_the_description_of_a_folder_changes_with_its_files(copy: Path) -> None:
    before = Pretrained(str(copy)).description
    again = Pretrained(str(copy)).description
    weights = load_file(copy / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][3] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    assert before == again
    assert before["name"] == "copy"
    assert Pretrained(str(copy)).description != before


def test_a_head_projects_only_where_the_widths_differ() -> None:
    assert sum(weights.numel() for weights in Head(8, 8, 3).parameters()) == 8 * 3 + 3
    assert Head(16, 8, 3)(torch.ones(2, 16)).features.shape == (2, 8)


def test_a_head_gives_an_absent_row_a_zero_feature_and_no_gradient() -> None:
    head = Head(8, 8, 3)
    pooled = torch.ones(2, 8, requires_grad=True)

    features, logits = head(pooled, torch.tensor([True, False]))
    logits.sum().backward()

    assert features[1].eq(0).all()
    assert torch.equal(logits[1], head.classifier.bias)
    assert pooled.grad is not None
    assert pooled.grad[0].ne(0).any()
    assert pooled.grad[1].eq(0).all()
