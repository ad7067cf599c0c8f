from pathlib import Path

from benchmarks import bench_clips, results


def test_a_quick_run_measures_both_and_finds_the_same_pictures(tmp_path: Path) -> None:
    path = bench_clips.main(
        ["--quick", "--corpus", str(tmp_path / "corpus"), "--output", str(tmp_path)]
    )

    document = results.read(path)
    assert path == tmp_path / "clips--cpu.json"
    dialogues, epochs = document["rows"]["dialogues"], document["rows"]["epochs"]
    assert (dialogues["turns"], dialogues["films"], dialogues["scanned_turns"]) == (32, 1, 2)
    assert dialogues["turns_whose_pictures_differ"] == 0
    assert dialogues["scan_milliseconds_per_turn"] > 0
    assert epochs["clips"] == 16
    for name in ("decode_seconds", "cache_seconds", "fill_seconds", "open_seconds"):
        assert epochs[name] > 0
    assert document["versions"]["av"]
