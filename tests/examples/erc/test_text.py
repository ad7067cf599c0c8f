from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from examples.erc.dialogue import Dialogue, Utterance
from examples.erc.errors import InputError
from examples.erc.pretrained import Pretrained
from examples.erc.text import Prompter, TextDataset, TextEncoder, speaker_token

SPEAKERS = 3


@pytest.fixture(scope="module")
def encoder(tiny_encoders: dict[str, str]) -> Pretrained:
    return Pretrained(tiny_encoders["text"])


@pytest.fixture(scope="module")
def prompter(encoder: Pretrained) -> Prompter:
    return Prompter(encoder, SPEAKERS, 64)


def make_dialogue(*turns: tuple[int, str]) -> Dialogue:
    return Dialogue(
        "d",
        tuple(
            Utterance(f"d{number}", text, speaker, 0, None, None)
            for number, (speaker, text) in enumerate(turns)
        ),
    )


def decode(prompter: Prompter, ids: Sequence[int]) -> str:
    return " ".join(prompter.tokenizer.convert_ids_to_tokens(ids)).replace("\u0120", "_")


def read_row(prompter: Prompter, dialogue: Dialogue, row: int) -> str:
    return decode(prompter, TextDataset([dialogue], prompter)[[row]]["input_ids"][0].tolist())


def test_the_prompt_is_that_of_the_paper(prompter: Prompter) -> None:
    dialogue = make_dialogue((0, "hello there"), (1, "what is it"), (0, "I know"))

    tokens = read_row(prompter, dialogue, 2)

    expected = (
        "<s> <s1> _hello _there <s2> _what _is _it <s1> _I _know </s> _Now <s1> _feels <mask>"
    )
    assert tokens == expected


def test_the_future_is_never_in_a_prompt(prompter: Prompter) -> None:
    past = [(0, "hello there"), (1, "what is it")]
    short = make_dialogue(*past)
    long = make_dialogue(*past, (2, "Kathy"), (1, "you know"))

    assert read_row(prompter, long, 1) == read_row(prompter, short, 1)
    assert read_row(prompter, long, 1).endswith("_Now <s2> _feels <mask>")


def test_each_speaker_is_one_token(prompter: Prompter) -> None:
    ids = prompter.tokenizer.convert_tokens_to_ids([speaker_token(n) for n in range(SPEAKERS)])

    assert len(set(ids)) == SPEAKERS
    assert prompter.tokenizer.unk_token_id not in ids
    assert speaker_token(0) == "<s1>"


def test_text_that_reads_like_a_special_token_stays_text(prompter: Prompter) -> None:
    dialogue = make_dialogue((0, "hello <mask> </s> <s2> <s>"))

    tokens = read_row(prompter, dialogue, 0)

    special = [token for token in tokens.split() if token.startswith("<") and len(token) > 1]
    assert special == ["<s>", "<s1>", "</s>", "<s1>", "<mask>"]


def test_truncation_drops_the_oldest_words_and_keeps_the_question(encoder: Pretrained) -> None:
    prompter = Prompter(encoder, SPEAKERS, 10)
    dialogue = make_dialogue((0, "hello there"), (1, "what is it"), (0, "I know you"))

    tokens = read_row(prompter, dialogue, 2)

    assert tokens == "<s> <s1> _I _know _you </s> _Now <s1> _feels <mask>"


def test_truncation_keeps_the_last_words_of_a_long_utterance(encoder: Pretrained) -> None:
    prompter = Prompter(encoder, SPEAKERS, 8)

    tokens = read_row(prompter, make_dialogue((2, "I know you are here")), 0)

    assert tokens == "<s> _are _here </s> _Now <s3> _feels <mask>"


def test_a_prompt_of_exactly_the_greatest_length_is_whole(encoder: Pretrained) -> None:
    dialogue = make_dialogue((0, "hello there"))
    whole = read_row(Prompter(encoder, SPEAKERS, 64), dialogue, 0)
    length = len(whole.split())

    assert read_row(Prompter(encoder, SPEAKERS, length), dialogue, 0) == whole
    assert read_row(Prompter(encoder, SPEAKERS, length - 1), dialogue, 0) != whole


@pytest.mark.parametrize("tokens", [0, 6, 65])
def test_a_length_that_does_not_fit_is_refused(encoder: Pretrained, tokens: int) -> None:
    with pytest.raises(
        InputError, match=rf"max_text_tokens: expected between 7 .* and 64 .*, got {tokens};"
    ):
        Prompter(encoder, SPEAKERS, tokens)


def test_batches_are_padded_on_the_left(prompter: Prompter) -> None:
    dialogue = make_dialogue((0, "hello there"), (1, "what is it"))

    batch = TextDataset([dialogue], prompter)[[1, 0]]

    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (2, 13)
    assert ids.dtype == mask.dtype == torch.int64
    assert (ids[:, -1] == prompter.tokenizer.mask_token_id).all()
    assert mask.tolist() == [[1] * 13, [0] * 4 + [1] * 9]
    assert (ids[mask == 0] == prompter.tokenizer.pad_token_id).all()


def test_rows_run_through_dialogue_after_dialogue(prompter: Prompter) -> None:
    first = make_dialogue((0, "hello"), (1, "there"))
    other = Dialogue("e", (Utterance("e0", "Kathy", 0, 0, None, None),))
    dataset = TextDataset([first, other], prompter)

    tokens = decode(prompter, dataset[[2]]["input_ids"][0].tolist())

    assert len(dataset) == 3
    assert tokens == "<s> <s1> _Kathy </s> _Now <s1> _feels <mask>"


@pytest.fixture
def model(encoder: Pretrained, prompter: Prompter) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(encoder, prompter, num_classes=7, feature_size=8).eval()


def test_the_encoder_gives_projected_features_and_logits(
    model: TextEncoder, prompter: Prompter
) -> None:
    batch = TextDataset([make_dialogue((0, "hello"), (1, "what is it"))], prompter)[[0, 1]]

    features, logits = model(**batch)

    assert features.shape == (2, 8)
    assert logits.shape == (2, 7)
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.head.classifier(features))


def test_the_feature_is_the_state_of_the_mask(encoder: Pretrained, prompter: Prompter) -> None:
    model = TextEncoder(encoder, prompter, num_classes=7, feature_size=16).eval()
    batch = TextDataset([make_dialogue((0, "hello"), (1, "what is it"))], prompter)[[0, 1]]

    features, _ = model(**batch)

    hidden = model.body(**batch).last_hidden_state
    masks = batch["input_ids"] == prompter.tokenizer.mask_token_id
    assert torch.equal(features, hidden[masks])


def test_padding_does_not_change_a_feature(model: TextEncoder, prompter: Prompter) -> None:
    dataset = TextDataset([make_dialogue((0, "hello"), (1, "what is it"), (2, "Kathy"))], prompter)

    alone = model(**dataset[[0]]).features[0]
    padded = model(**dataset[[0, 2]]).features[0]

    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)


def test_random_parts_follow_the_global_seed(encoder: Pretrained, prompter: Prompter) -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return TextEncoder(encoder, prompter, num_classes=7, feature_size=8).state_dict()

    first, again, other = draw(1), draw(1), draw(2)

    embeddings = "body.embeddings.word_embeddings.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.classifier.weight"], other["head.classifier.weight"])
    assert not torch.equal(first[embeddings][-SPEAKERS:], other[embeddings][-SPEAKERS:])
    assert torch.equal(first[embeddings][:-SPEAKERS], other[embeddings][:-SPEAKERS])


def test_every_parameter_gets_a_gradient(model: TextEncoder, prompter: Prompter) -> None:
    batch = TextDataset([make_dialogue((0, "hello"))], prompter)[[0]]

    model(**batch).logits.square().sum().backward()

    without = [name for name, weights in model.named_parameters() if weights.grad is None]
    assert without == []


def test_features_stay_in_float32_under_autocast(model: TextEncoder, prompter: Prompter) -> None:
    batch = TextDataset([make_dialogue((0, "hello"))], prompter)[[0]]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = model(**batch)

    assert features.dtype == logits.dtype == torch.float32


def test_an_encoder_that_left_padding_moves_is_refused(
    encoder: Pretrained, prompter: Prompter, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(
            vocab_size=len(prompter.tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.5,
        )
    ).save_pretrained(tmp_path)

    with pytest.raises(InputError, match="padding on its left, got one that does not"):
        TextEncoder(Pretrained(str(tmp_path)), prompter, num_classes=7, feature_size=16)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2Tokenizer

    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        ["hello"], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    GPT2Tokenizer(vocab=learner.get_vocab(), merges=[]).save_pretrained(tmp_path)
    GPT2Config(vocab_size=300).save_pretrained(tmp_path)

    with pytest.raises(InputError, match=r"expected a tokenizer .* mask .*masked language model"):
        Prompter(Pretrained(str(tmp_path)), SPEAKERS, 64)


def test_without_the_question_the_prompt_ends_with_the_words(encoder: Pretrained) -> None:
    silent = Prompter(encoder, SPEAKERS, 64, ask=False)
    dialogue = make_dialogue((0, "hello there"), (1, "what is it"))

    assert read_row(silent, dialogue, 1) == "<s> <s1> _hello _there <s2> _what _is _it </s>"
    short = Prompter(encoder, SPEAKERS, 5, ask=False)
    assert read_row(short, dialogue, 1) == "<s> _what _is _it </s>"
    with pytest.raises(InputError, match="max_text_tokens: expected between 3 "):
        Prompter(encoder, SPEAKERS, 2, ask=False)


def test_without_the_question_the_feature_is_the_state_of_the_beginning(
    encoder: Pretrained,
) -> None:
    silent = Prompter(encoder, SPEAKERS, 64, ask=False)
    model = TextEncoder(encoder, silent, num_classes=7, feature_size=16).eval()
    batch = TextDataset([make_dialogue((0, "hello"), (1, "what is it"))], silent)[[0, 1]]

    features, _ = model(**batch)

    hidden = model.body(**batch).last_hidden_state
    starts = batch["input_ids"] == silent.tokenizer.bos_token_id
    assert batch["attention_mask"][0, 0] == 0  # the first row is padded
    assert torch.equal(features, hidden[starts])
