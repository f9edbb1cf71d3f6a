"""Window plan, the meter against a plain forward pass, routing figures, the card, the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import OlmoeConfig, OlmoeForCausalLM  # noqa: E402

from reference_base import MODEL_DIR, evaluate, plot, routing  # noqa: E402
from reference_base.card import card  # noqa: E402

DATA = Path(__file__).parents[3] / "shared" / "data"


@given(st.integers(0, 500), st.integers(1, 40), st.data())
def test_windows_score_every_token_once_with_context(count, size, data):
    stride = data.draw(st.integers(1, size))
    scored = []
    for start, stop, first in evaluate.windows(count, size, stride):
        assert 0 <= start <= first < stop <= count
        assert stop - start <= size
        assert start == 0 or first - start >= size - stride
        scored += range(first, stop)
    assert scored == list(range(count))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        pad_token_id=1,
        eos_token_id=0,
    )
    return OlmoeForCausalLM(config).eval()


def test_meter_is_the_plain_loss_and_the_plain_router(tiny):
    stream = np.random.default_rng(0).integers(0, 50, 100).astype(np.uint16)
    nll, mass, top = evaluate.Meter(tiny).run(stream)
    ids = torch.from_numpy(stream.astype(np.int64))[None]
    with torch.no_grad():
        out = tiny(input_ids=ids[:, :-1], output_router_logits=True)
    plain = torch.nn.functional.cross_entropy(out.logits[0], ids[0, 1:], reduction="none")
    np.testing.assert_allclose(nll, plain.numpy(), rtol=1e-4)
    probability = torch.stack([logits.softmax(-1).mean(0) for logits in out.router_logits])
    # 99 tokens fit one window, which counts as the first half.
    np.testing.assert_allclose(mass[0], probability.numpy(), rtol=1e-4)
    np.testing.assert_allclose(top[0].sum(-1), 1)


def test_meter_halves_and_long_streams(tiny):
    stream = np.random.default_rng(1).integers(0, 50, 16 * 128 * 3).astype(np.uint16)
    nll, mass, _ = evaluate.Meter(tiny).run(stream)
    assert (nll > 0).all()
    np.testing.assert_allclose(mass.sum(-1), 1, rtol=1e-5)


def test_information_of_equal_and_of_disjoint_routing():
    same = np.full((4, 2, 8), 1 / 8)
    assert routing.information(same).tolist() == [0, 0]
    disjoint = np.eye(4)[:, None, :]
    assert routing.information(disjoint).tolist() == [2]


def test_prior_rows_sum_to_one():
    rows = routing.prior(np.random.default_rng(0).random((3, 4, 16)))
    np.testing.assert_allclose(rows.sum(-1), 1)


def test_plot_is_a_png_and_leaves_nothing_else(tmp_path):
    mass = np.random.default_rng(0).dirichlet(np.ones(4), (3, 2))
    plot.heat_maps(mass, ["one", "two", "three"], tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["routing.png"]


def test_card_holds_the_figures(tiny):
    names = ["fiction", "news"]
    bits = {"model": 1.5, "trigram": 1.875, "unigram": 3.0}
    result = {
        "parameters": 1_000_000,
        "training_tokens": 2_500_000,
        "texts": {n: {"bytes": 77, "bits_per_byte": bits} for n in names},
        "routing": {
            "domains": names,
            "cosine_of_mass": [[[1.0, 1.0], [0.5, 0.7]], [[0.5, 0.7], [1.0, 1.0]]],
            "cosine_of_top": [[[1.0, 1.0], [0.1, 0.3]], [[0.1, 0.3], [1.0, 1.0]]],
            "information_bits": [0.25, 0.5],
            "idle_experts": [0, 3],
        },
    }
    # Resumed once: the counts of both parts are added.
    training = [
        {"step": s, "tokens": s * 24 * 257, "seconds": 120, "loss": 3.456} for s in (3, 6, 4)
    ]
    text = card(result, training, tiny.config.to_dict(), 256, 128)
    for wanted in (
        "| fiction (held out) | 77 | 3.000 | 1.875 | 1.500 |",
        "| AG News (domain not trained on) | 77 |",
        "| fiction | 1.00 | 0.60 |",
        "| fiction | 1.00 | 0.20 |",
        "10 steps of 24 sequences of 256 tokens",
        "in 4 minutes on a CPU",
        "CC BY-SA 4.0",
        "by layer: 0.25, 0.50. Experts",
        "by layer: 0, 3.",
    ):
        assert wanted in text


def test_missing_model_is_one_line(tmp_path, capsys):
    assert evaluate.main(["--data", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert "config.json: no such file" in capsys.readouterr().err


def test_missing_data_is_one_line(tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "training_log.jsonl"):
        (tmp_path / name).write_text("{}")
    assert evaluate.main(["--data", str(tmp_path), "--model", str(tmp_path)]) == 2
    assert "gutenberg: no such folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the checkout")
@pytest.mark.skipif(not (MODEL_DIR / "config.json").is_file(), reason="no reference base yet")
def test_the_shipped_figures_are_reproduced(tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    shipped = json.loads((MODEL_DIR / "evaluation.json").read_text())
    again = evaluate.evaluate(DATA, tmp_path / "model")
    for name, text in shipped["texts"].items():
        assert again["texts"][name]["bits_per_byte"] == pytest.approx(
            text["bits_per_byte"], abs=2e-3
        )
        assert text["bits_per_byte"]["model"] < text["bits_per_byte"]["trigram"]
