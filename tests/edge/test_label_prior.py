"""What a device adds to its labels' logits because it knows how often it sees each."""

import numpy as np

from edge.data import Row, prompter
from edge.trainer import label_bias
from protocol.messages import Task

LABELS = ("finance", "science", "sport")


def test_the_bias_by_hand(tokenizer):
    prompts = prompter(tokenizer, Task(labels=LABELS), 2, 32, 2)
    rows = [Row("x", "sport")] * 3 + [Row("x", "finance")]
    bias = label_bias(prompts, rows, 2.0)
    first = prompts.verbaliser.first
    # Half a row more of each: 1.5, 0.5 and 3.5 of 5.5.
    wanted = 2.0 * np.log(np.array([1.5, 0.5, 3.5]) / 5.5)
    np.testing.assert_allclose(bias[first], wanted, rtol=1e-6)
    assert bias.shape == (tokenizer.get_vocab_size(),)
    assert np.flatnonzero(bias).tolist() == sorted(first.tolist())


def test_without_labels_or_weight_there_is_none(tokenizer):
    rows = [Row("x", "sport")]
    assert label_bias(prompter(tokenizer, Task(labels=LABELS), 2, 32, 2), rows, 0.0) is None
    assert label_bias(prompter(tokenizer, Task(), 2, 32, 2), rows, 1.0) is None
