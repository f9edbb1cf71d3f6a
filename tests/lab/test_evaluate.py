"""A tiny random checkpoint goes through the lab's own measuring and through the ceiling."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM

from edge import data
from lab import central, dataset, evaluate
from lab.dataset import Row

WORDS = "text topic : red green apple grass blood leaf rose frog sky".split()
TEXTS = {"red": ("apple", "blood", "rose"), "green": ("grass", "leaf", "frog")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=32, tie_word_embeddings=True, eos_token_id=0, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<end>", "<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "task.json"
    path.write_text(json.dumps({"labels": ["green", "red"], "template": "text {text} topic :"}))
    return path


def rows(count, seed):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        label = ("green", "red")[i % 2]
        words = [str(rng.choice(TEXTS[label])), *["sky"] * int(rng.integers(0, 4))]
        made.append(Row(" ".join(rng.permutation(words)), label, label))
    return made


def test_padding_and_batching_do_not_change_the_answer(base, task):
    model = evaluate.load_base(base)
    prompts = evaluate.prompter_of(task, base, 8, 16, 1)
    some = [data.Row(r.text, r.label) for r in rows(8, 0)]
    batch = next(data.evaluation_batches(prompts, some))
    with torch.no_grad():
        together = evaluate.answer_logits(model, batch)
        for b, row in enumerate(some):
            tokens, places, _ = prompts.row(row, None)
            alone = model(input_ids=torch.tensor([tokens])).logits[0, places[0]]
            torch.testing.assert_close(together[b, 0], alone, atol=1e-5, rtol=1e-5)


def test_score_counts_the_right_label_among_labels_only(base, task):
    prompts = evaluate.prompter_of(task, base, 4, 16, 1)
    some = [data.Row(r.text, r.label) for r in rows(6, 1)]
    assert prompts.verbaliser is not None
    red = int(prompts.verbaliser.first[1])

    class Always:
        """Likes the token of no label most, then the one for red."""

        def __call__(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 32)
            logits[..., 0], logits[..., red] = 9.0, 1.0
            return type("Output", (), {"logits": logits})

    found = evaluate.score(Always(), prompts, some, "x")
    assert (found.accuracy, found.rows) == (0.5, 6)
    norm = np.log(30 + np.exp(9) + np.e)
    assert found.loss == pytest.approx(norm - 0.5, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_central_training_learns_and_its_adapter_is_read_back(base, task, tmp_path):
    prompts = evaluate.prompter_of(task, base, 8, 16, 1)
    some = [data.Row(r.text, r.label) for r in rows(64, 2)]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(0)
    model = central.adapted(base, 2, experts, [], ["gate"])
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "gate" in n for n in trainable)
    central.train(model, prompts, some, 8 * 60, 0.02, 0.003, 0)
    trained = evaluate.score(model, prompts, some, "central")
    assert trained.accuracy > 0.85  # chance is 0.5
    model.save_pretrained(tmp_path / "adapter")
    again = evaluate.score(
        evaluate.load_adapted(base, tmp_path / "adapter"), prompts, some, "central"
    )
    assert again.loss == pytest.approx(trained.loss, rel=1e-4)
    assert replace(again, loss=0.0) == replace(trained, loss=0.0)


def test_the_process_answers_one_line_per_adapter(base, task, tmp_path):
    dataset.write(tmp_path / "test.jsonl", rows(6, 3))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lab.evaluate", "--base", str(base), "--task", str(task)),
            *("--rows", str(tmp_path / "test.jsonl"), "--sequence", "16", "--answers", "1"),
        ],
        input="-\n\n-\n",
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2
    assert found[0] == found[1]
    assert found[0]["adapter"] == "-"
    assert found[0]["rows"] == 6
