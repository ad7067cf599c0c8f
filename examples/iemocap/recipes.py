"""Every number of TelME on IEMOCAP, each with its source.

*Released* is the authors' code, github.com/yuntaeyang/TelME at commit f22fc9f; files and lines are
those of its folder ``IEMOCAP``. *Paper* is Yun et al., NAACL 2024 (arXiv 2401.12987); its Table 9
was at hand through summaries only, so a number that rests on it says so. *Recommended* is released,
but for what gains on dev with extracted features, test left alone; ``python -m
benchmarks.bench_recommended_recipe iemocap FOLDER`` shows it.
The README tells where the two differ, ``docs/pipelines.rst`` where we depart from both.
"""

from dataclasses import replace

from examples.erc.recipe import (
    FusionRecipe,
    Optimisation,
    Recipe,
    StudentRecipe,
    TeacherRecipe,
)

_STAGE = Optimisation(
    learning_rate=1e-5,  # teacher.py:30, student.py:35, fusion.py:33; paper, appendix
    epochs=10,  # teacher.py:29, student.py:34
    batch_size=4,  # teacher.py:31, student.py:36, fusion.py:34
    warmup=1 / 10,  # one epoch of ten is meant: teacher.py:155-158, counted in rows, not in steps
    weight_decay=0.01,  # AdamW's default in the pinned torch 1.13.1: teacher.py:157
    max_gradient_norm=10.0,  # teacher.py:67, student.py:84, fusion.py:75
    patience=None,  # all epochs are trained, the best on dev is kept: teacher.py:72-79
)

RELEASED = Recipe(
    name="released",
    teacher=TeacherRecipe(_STAGE),
    student=StudentRecipe(
        optimisation=_STAGE,
        temperature=2.0,  # iemocap_kd.py:22
        response_weight=0.1,  # student.py:58
        inter_weight=1.0,  # iemocap_kd.py:22
        intra_weight=1.0,  # iemocap_kd.py:22
        feature_weight=1.0,  # student.py:58
        feature_temperature=1.0,  # iemocap_kd.py:37
    ),
    fusion=FusionRecipe(
        optimisation=replace(_STAGE, epochs=8, warmup=1 / 8),  # fusion.py:32, 200-203
        threshold=0.2,  # fusion.py:189
        num_heads=4,  # fusion.py:189
        dropout=0.2,  # fusion.py:189
        attend_over="modalities",  # the code attends over the batch: a fault, not a number
    ),
)

PAPER = Recipe(
    name="paper",
    teacher=RELEASED.teacher,
    student=RELEASED.student,  # Table 9, its two temperatures put back under their corpora
    fusion=replace(
        RELEASED.fusion,
        threshold=0.01,  # Table 9, at second hand
        dropout=0.1,  # Table 9, at second hand
    ),
)

RECOMMENDED = replace(
    RELEASED,
    name="recommended",
    fusion=replace(RELEASED.fusion, threshold=1.0),  # the shift may be as long as the feature
)

RECIPES = {recipe.name: recipe for recipe in (PAPER, RELEASED, RECOMMENDED)}
