"""Batches for an encoder-decoder: the prompt is the encoder's input, the answer the decoder's output."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import data
from edge.data import Prompter, Row
from protocol.messages import Task

END = 1


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of one token per character, `ord` of it."""

    class Encoding:
        def __init__(self, ids):
            self.ids = ids

    class Letters:
        def encode(self, text, *, add_special_tokens=True):
            return Encoding([ord(c) for c in text])

    return Letters()


LABELS = ("ab", "cde")
WORDS = data.Verbaliser(LABELS, ((97, 98), (99, 100, 101)), codes=False)


def prompts(tokenizer, verbaliser=WORDS, end=END):
    labels = verbaliser.labels if verbaliser else ()
    task = Task(labels=labels, template="Q:{text}?")
    return Prompter(tokenizer, task, 2, 24, 3, verbaliser, True, end)


def text_of(ids):
    return "".join(chr(i) for i in ids)


def test_the_prompt_is_ended_and_the_answer_is_apart(letters):
    p = prompts(letters)
    batch = p.assemble([Row("hi", "ab")], None)
    n = len("Q:hi?")
    assert text_of(batch.tokens[0, :n]) == "Q:hi?"
    assert batch.tokens[0, n:].tolist() == [END] + [0] * (23 - n)
    assert batch.valid[0].tolist() == [1.0] * (n + 1) + [0.0] * (23 - n)
    assert batch.targets[0].tolist() == [97, 98, 0]
    assert batch.weights[0].tolist() == [1.0, 1.0, 0.0]
    assert not batch.positions.any()
    assert batch.valid[1].sum() == batch.weights[1].sum() == 0


def test_a_long_text_leaves_room_for_what_follows_it_and_the_end(letters):
    p = prompts(letters)
    tokens, places, answer = p.row(Row("x" * 99, "cde"), None)
    assert len(tokens) == 24
    assert tokens[-2:] == [ord("?"), END]
    assert places == []
    assert answer == [99, 100, 101]


@settings(max_examples=80, deadline=None)
@given(
    text=st.text("abcdefgh", max_size=60),
    seed=st.none() | st.integers(0, 99),
    end=st.none() | st.just(END),
)
def test_plain_text_is_continued(letters, text, seed, end):
    p = prompts(letters, None, end)
    rng = None if seed is None else np.random.default_rng(seed)
    tokens, places, answer = p.row(Row(text), rng)
    assert len(tokens) <= 24
    assert places == []
    if end is not None:
        assert tokens.pop() == END
    assert len(answer) <= 3
    assert bool(answer) == (len(text) > 1)
    assert text_of(tokens) + text_of(answer) in text
    assert tokens or len(text) == 0


def test_the_base_decides(letters):
    def made(**base):
        return data.prompter(letters, Task(), 1, 8, 2, SimpleNamespace(**base))

    assert not data.prompter(letters, Task(), 1, 8, 2).seq2seq
    assert not made(architecture="causal", config={"eos_token_id": 1}).seq2seq
    p = made(architecture="seq2seq", config={"eos_token_id": 1})
    assert (p.seq2seq, p.end) == (True, 1)
    assert made(architecture="seq2seq", config={"eos_token_id": [1, 2]}).end is None
