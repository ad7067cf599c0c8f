"""The surface: names, signatures, types, and what importing costs others."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import telme_kd
from telme_kd import errors, functional, interop

PACKAGE = Path(telme_kd.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = [
    telme_kd.AttentionShiftingFusion,
    telme_kd.BatchSimilarityLoss,
    telme_kd.DISTLoss,
    telme_kd.RelationMemory,
    telme_kd.ShiftingFusion,
    telme_kd.StudentLoss,
    telme_kd.accumulate_gradient,
    telme_kd.available_backends,
    *(getattr(functional, name) for name in functional.__all__),
    interop.load_released_fusion,
]


def test_names_are_those_of_the_contract() -> None:
    contract = {
        "AttentionShiftingFusion",
        "BatchSimilarityLoss",
        "DISTLoss",
        "ShiftingFusion",
        "StudentLoss",
        "__version__",
        "available_backends",
        "functional",
    }
    assert contract <= set(telme_kd.__all__)
    assert len(set(telme_kd.__all__)) == len(telme_kd.__all__)
    assert all(hasattr(telme_kd, name) for name in telme_kd.__all__)
    assert {"dist_loss", "batch_similarity_loss", "bounded_shift"} <= set(functional.__all__)
    starred: dict[str, Any] = {}
    exec("from telme_kd import *", starred)
    assert set(telme_kd.__all__) <= set(starred)


# Keyword-only options stand after the star, with their defaults; the order is part of the contract.
SIGNATURES: dict[str, tuple[Callable[..., Any], str]] = {
    "dist_loss": (
        functional.dist_loss,
        "(student_logits, teacher_logits, *, temperature=1.0, inter_weight=1.0, intra_weight=1.0, "
        "class_dim=-1, mask=None, eps=None, group=None, backend='auto')",
    ),
    "batch_similarity_loss": (
        functional.batch_similarity_loss,
        "(student_features, teacher_features, *, temperature=1.0, mask=None, group=None, "
        "backend='auto')",
    ),
    "linear_dist_loss": (
        functional.linear_dist_loss,
        "(student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias=None, "
        "teacher_bias=None, temperature=1.0, inter_weight=1.0, intra_weight=1.0, mask=None, "
        "eps=None, chunk_bytes=536870912, backend='auto')",
    ),
    "sharded_dist_loss": (
        functional.sharded_dist_loss,
        "(student_logits, teacher_logits, *, class_group, temperature=1.0, inter_weight=1.0, "
        "intra_weight=1.0, class_dim=-1, mask=None, eps=None, group=None)",
    ),
    "accumulate_gradient": (
        telme_kd.accumulate_gradient,
        f"(parts, forward, criterion, *, no_sync={nullcontext})",
    ),
    "StudentLoss": (
        telme_kd.StudentLoss,
        "(response_weight=1.0, feature_weight=1.0, *, response=None, feature=None, "
        "class_weight=None, label_smoothing=0.0, group=None, memory_size=0)",
    ),
    "bounded_shift": (
        functional.bounded_shift,
        "(anchor, displacement, *, threshold, eps=None)",
    ),
    "DISTLoss": (
        telme_kd.DISTLoss,
        "(temperature=1.0, inter_weight=1.0, intra_weight=1.0, *, class_dim=-1, eps=None, "
        "group=None, memory_size=0, backend='auto')",
    ),
    "DISTLoss.forward": (
        telme_kd.DISTLoss.forward,
        "(self, student_logits, teacher_logits, mask=None)",
    ),
    "BatchSimilarityLoss": (
        telme_kd.BatchSimilarityLoss,
        "(temperature=1.0, *, group=None, memory_size=0, backend='auto')",
    ),
    "RelationMemory": (telme_kd.RelationMemory, "(size)"),
    "BatchSimilarityLoss.forward": (
        telme_kd.BatchSimilarityLoss.forward,
        "(self, student_features, teacher_features, mask=None)",
    ),
    "ShiftingFusion": (
        telme_kd.ShiftingFusion,
        "(anchor_dim, displacement_dim, threshold=0.1, *, eps=None, backend='auto')",
    ),
    "ShiftingFusion.forward": (telme_kd.ShiftingFusion.forward, "(self, anchor, nonverbal)"),
    "AttentionShiftingFusion": (
        telme_kd.AttentionShiftingFusion,
        "(anchor_dim, student_dims, num_heads=4, threshold=0.1, dropout=0.1, "
        "attend_over='modalities', num_classes=None, *, causal=False, eps=None, "
        "backend='auto')",
    ),
    "AttentionShiftingFusion.forward": (
        telme_kd.AttentionShiftingFusion.forward,
        "(self, anchor, *students, mask=None)",
    ),
    "load_released_fusion": (
        interop.load_released_fusion,
        "(state_dict, *, num_heads, threshold, student_dims=None, dropout=0.2)",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_the_contract(name: str) -> None:
    function, expected = SIGNATURES[name]
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert shown == expected


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_everything_public_is_documented_and_annotated(function: Callable[..., Any]) -> None:
    documentation = inspect.getdoc(function)
    assert documentation is not None
    callables = [function] if not isinstance(function, type) else [function.__init__]
    if isinstance(function, type) and "forward" in vars(function):  # a memory has none
        assert inspect.getdoc(function.forward)
        callables.append(function.forward)
    for callable_ in callables:
        names = set(inspect.signature(callable_).parameters) - {"self"}
        assert names | {"return"} <= set(callable_.__annotations__)
    options = inspect.signature(function).parameters
    if "It is :func:" not in documentation:
        assert all(f"    {name}: " in documentation for name in options), function


@pytest.mark.parametrize("module", [telme_kd.DISTLoss, telme_kd.BatchSimilarityLoss])
def test_annotations_can_be_resolved_at_run_time(module: type) -> None:
    assert "group" in get_type_hints(module.__init__)


def test_version_is_that_of_the_distribution() -> None:
    assert telme_kd.__version__ == importlib.metadata.version("telme-kd")


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_errors_module_exports_errors_alone() -> None:
    public = [value for name, value in vars(errors).items() if not name.startswith("_")]
    assert all(issubclass(value, (Exception, Warning)) for value in public)


# --- imports run one way --------------------------------------------------------------------------


def imports_of(source: Path) -> set[str]:
    """Modules that a file imports anywhere, functions included."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: imports are absolute"
            imported |= {
                node.module or "",
                *(f"{node.module}.{alias.name}" for alias in node.names),
            }
    return imported


def test_package_imports_nothing_but_torch_einops_and_the_standard_library() -> None:
    allowed = {"torch", "einops", "triton", "telme_kd", *sys.stdlib_module_names}
    for source in SOURCES:
        roots = {name.split(".")[0] for name in imports_of(source)}
        assert roots <= allowed, (source, roots - allowed)


def test_reference_imports_nothing_of_ours_but_itself() -> None:
    for source in (PACKAGE / "reference").glob("*.py"):
        ours = {name for name in imports_of(source) if name.startswith("telme_kd")}
        assert all(name.startswith("telme_kd.reference.") for name in ours), source


@pytest.mark.parametrize("lower", ["_checks", "errors", "_typing", "_version", "_dispatch"])
def test_lower_layers_do_not_import_the_operators(lower: str) -> None:
    upper = {"dist", "batch_similarity", "fusion", "student", "functional", "interop"}
    imported = imports_of(PACKAGE / f"{lower}.py")
    assert not imported & {f"telme_kd.{name}" for name in upper}


def test_importing_loads_no_other_library() -> None:
    code = (
        "import sys, torch, einops; before = set(sys.modules); import telme_kd; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    completed = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(completed.stdout.split()) - set(sys.stdlib_module_names)
    assert loaded <= {"telme_kd", "torch", "einops"}
    assert completed.stderr == ""


def test_functions_are_those_of_the_modules() -> None:
    from telme_kd import batch_similarity, dist, fusion

    assert functional.dist_loss is dist.dist_loss
    assert functional.inter_class_loss is dist.inter_class_loss
    assert functional.intra_class_loss is dist.intra_class_loss
    assert functional.batch_similarity_loss is batch_similarity.batch_similarity_loss
    assert functional.bounded_shift is fusion.bounded_shift
