import numpy as np

from edge import native, throughput
from export import throughput_program
from protocol import packing


def run(path, inputs):
    program = native.Program(path)
    try:
        return program.run("forward", inputs)[0].copy()
    finally:
        program.close()


def test_the_shipped_program_is_the_product_and_is_what_is_lowered_today(tmp_path):
    rng = np.random.default_rng(0)
    width = throughput.WIDTH
    packed, scale = packing.quantize(rng.standard_normal((width, width)) / 32)
    x = rng.standard_normal((throughput.TOKENS, width), np.float32)
    inputs = [x, packed.reshape(-1), scale.reshape(-1)]
    shipped = run(throughput.PROGRAM, inputs)
    np.testing.assert_allclose(shipped, x @ packing.dequantize(packed, scale).T, atol=1e-4)
    path = tmp_path / "today.pte"
    path.write_bytes(throughput_program.program())
    assert (run(path, inputs) == shipped).all()
