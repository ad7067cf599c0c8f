from pathlib import Path

from benchmarks import bench_clips, results


def test_a_quick_run_measures_all_and_finds_the_same_pictures(tmp_path: Path) -> None:
    path = bench_clips.main(
        ["--quick", "--corpus", str(tmp_path / "corpus"), "--output", str(tmp_path)]
    )

    document = results.read(path)
    assert path == tmp_path / "clips--cpu.json"
    assert document["versions"]["av"]
    preparation, stages = document["rows"]["preparation"], document["rows"]["stages"]
    assert (preparation["turns"], preparation["films"]) == (32, 1)
    assert preparation["turns_taken_alone"] == 2
    assert preparation["turns_whose_pictures_differ"] == 0
    for way in ("pass", "scan", "look"):
        assert preparation[f"{way}_milliseconds_per_turn"] > 0
    assert [*stages] == ["128 x 96", "192 x 144"]
    for rows in stages.values():
        names = [row["stage"] for row in rows]
        assert names == ["teacher", "student, audio", "student, visual", "fusion"]
        for row in rows:
            assert row["steps"] == 3
            assert row["anew_over_kept"] == row["anew_seconds"] / row["kept_seconds"] > 0
            whole = row["fill_seconds"] + row["epochs"] * row["kept_seconds"]
            assert row["with_filling"] == row["epochs"] * row["anew_seconds"] / whole
        assert rows[0]["fill_seconds"] == 0
