from examples.erc.dialogue import Corpus, Dialogue, Utterance, number_speakers


def make_dialogue(identity: str, speakers: list[int]) -> Dialogue:
    return Dialogue(
        identity,
        tuple(
            Utterance(f"{identity}_{number}", f"words {number}", speaker, 0, None, None)
            for number, speaker in enumerate(speakers)
        ),
    )


def test_context_ends_with_the_utterance_itself() -> None:
    dialogue = make_dialogue("d", [0, 1, 0, 2])

    contexts = [dialogue.context(position) for position in range(4)]

    assert contexts == [dialogue.utterances[:count] for count in (1, 2, 3, 4)]


def test_number_speakers_counts_by_first_appearance() -> None:
    assert number_speakers(["Ross", "Joey", "Ross", "Phoebe", "Joey"]) == [0, 1, 0, 2, 1]


def test_number_speakers_starts_anew_for_every_dialogue() -> None:
    assert number_speakers(["Joey", "Ross"]) == number_speakers(["Ross", "Joey"]) == [0, 1]


def test_corpus_lists_utterances_in_row_order_and_the_largest_cast() -> None:
    first, second, other = (
        make_dialogue("a", [0, 1]),
        make_dialogue("b", [0]),
        make_dialogue("c", [0, 1, 2, 1]),
    )
    corpus = Corpus("meld", ("joy",), {"train": (first, second), "dev": (other,), "test": (first,)})

    names = [utterance.identity for utterance in corpus.utterances("train")]

    assert names == ["a_0", "a_1", "b_0"]
    assert corpus.speakers == 3
