import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.torch_version import TorchVersion

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


FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny_encoders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of an encoder with two commits on the Hub; main is the first, v2 the second."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for number, commit in enumerate((FIRST, SECOND)):
        home = repository / "snapshots" / commit
        shutil.copytree(tiny_encoders["text"], home)
        weights = load_file(home / "model.safetensors")
        weights["encoder.layer.0.output.dense.bias"].fill_(number)
        save_file(weights, home / "model.safetensors", metadata={"format": "pt"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    (repository / "refs" / "v2").write_text(SECOND)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def number_of(encoder: Pretrained) -> float:
    return float(load_body(encoder).encoder.layer[0].output.dense.bias.detach()[0])


@pytest.mark.parametrize(
    ("typed", "revision", "commit"),
    [
        ("org/tiny", None, FIRST),
        ("org/tiny@v2", None, SECOND),
        ("org/tiny", "v2", SECOND),
        (f"org/tiny@{SECOND}", None, SECOND),
    ],
)
def test_a_revision_is_resolved_to_a_commit_that_is_written_down(
    hub: Path, typed: str, revision: str | None, commit: str
) -> None:
    encoder = Pretrained.parse(typed, revision)

    assert encoder.description == {"name": "org/tiny", "revision": commit}
    assert number_of(encoder) == (commit == SECOND)


def test_all_parts_are_of_one_commit_although_the_branch_moves(hub: Path) -> None:
    encoder = Pretrained("org/tiny")
    assert encoder.commit == FIRST
    (hub / "refs" / "main").write_text(SECOND)

    assert number_of(encoder) == 0
    assert encoder.description["revision"] == FIRST
    assert number_of(Pretrained("org/tiny")) == 1


def test_a_revision_that_is_not_there_is_refused(hub: Path) -> None:
    with pytest.raises(InputError, match=r"org/tiny: expected .*; check the name, the revision"):
        _ = Pretrained.parse("org/tiny@v3").config


@pytest.mark.parametrize("typed", ["@v2", "org/tiny@", "@", "org/tiny@v2@v3@"])
def test_half_a_revision_is_refused(typed: str) -> None:
    with pytest.raises(InputError, match=r"expected NAME@REVISION"):
        Pretrained.parse(typed)


def test_two_revisions_are_refused() -> None:
    with pytest.raises(InputError, match=r"one branch, tag or commit"):
        Pretrained.parse("org/tiny@v2", "v3")


def test_a_folder_has_no_revision(copy: Path) -> None:
    with pytest.raises(InputError, match=r"leave @ and what follows out for a folder"):
        Pretrained.parse(f"{copy}@v2")
    odd = copy.rename(copy.with_name("copy@v2"))

    assert Pretrained.parse(str(odd)) == Pretrained(str(odd))
    assert Pretrained(str(odd)).description.keys() == {"name", "sha256"}


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModel", "AutoTokenizer"])
def test_code_that_comes_with_an_encoder_is_never_run(copy: Path, kind: str) -> None:
    marker = copy.parent / "marker"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (copy / "own.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        text = json.loads((copy / name).read_text())
        parts = {"AutoTokenizer": ["own.T", "own.T"], "AutoConfig": "own.C", "AutoModel": "own.M"}
        (copy / name).write_text(json.dumps({**text, "model_type": "own", "auto_map": parts}))

    # A tokenizer of a kind that is known is taken, without its own code.
    with nullcontext() if kind == "AutoTokenizer" else pytest.raises(InputError, match=kind):
        Pretrained(str(copy)).load(kind)
    assert not marker.exists()


def test_every_load_forbids_code(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def note(name: str, **options: Any) -> None:
        asked.append(options)

    for kind in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", note)
        Pretrained(str(copy)).load(kind)
    assert [options["trust_remote_code"] for options in asked] == [False, False]
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "true"
    with pytest.raises(InputError, match="trust_remote_code"):
        Pretrained(str(copy)).load("AutoConfig", trust_remote_code=True)


@pytest.mark.parametrize("size", ["null", '"wide"', "0", "true"])
def test_a_hidden_size_that_is_none_is_refused(copy: Path, size: str) -> None:
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 16', f'"hidden_size": {size}'))

    with pytest.raises(InputError, match=r"copy: expected an encoder"):
        _ = Pretrained(str(copy)).hidden_size


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


def test_a_pytorch_whose_unpickler_has_faults_reads_safetensors_alone(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    load_body(Pretrained(str(copy)))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()

    with pytest.raises(InputError, match="expected an encoder for AutoModel"):
        load_body(Pretrained(str(copy)))


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
