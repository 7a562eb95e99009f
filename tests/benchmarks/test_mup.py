"""Width scaling: what the benchmark measures, in small."""

import numpy as np
import pytest


def test_training_moves_activations_alike_at_every_width():
    """The coordinate check: with a base width nothing grows, without one what sums over it does."""
    from benchmarks import mup

    def slopes(base: int) -> dict:
        config = {width: mup.config(width, base, depth=1) for width in (32, 128)}
        return mup.slopes(
            {w: mup.moved(c, rate=2**-6, steps=3, seeds=1) for w, c in config.items()}
        )

    scaled, plain = slopes(32), slopes(0)
    assert set(scaled) == {"input", "times", "modulation", "stream", "output"}
    # Two widths, one seed: a slope of 0.3 is a factor of 1.5 over 4 times the width.
    assert max(map(abs, scaled.values())) < 0.3, scaled
    assert min(plain["modulation"], plain["output"]) > 0.5, plain


def test_the_best_rate_is_that_of_a_parabola_and_of_none_at_the_edge():
    from benchmarks import mup

    rates = 2.0 ** np.arange(-8, -2)
    losses = {rate: 1 + np.square(np.log2(rate) + 5.3) for rate in rates}
    assert mup.best_rate(losses) == pytest.approx(2**-5.3)
    assert np.isnan(mup.best_rate({rate: rate for rate in rates}))
    assert mup.spread({128: 2.0, 256: 1.0, 512: 3.0}) == 3.0
    assert np.isnan(mup.spread({128: 2.0, 256: 1.0, 512: np.nan})), "a claim that cannot hold"


def test_slopes_are_powers_of_the_width():
    from benchmarks import mup

    sizes = {width: {"flat": 3.0, "linear": 2.0 * width} for width in (128, 256, 512)}
    assert mup.slopes(sizes) == pytest.approx({"flat": 0.0, "linear": 1.0}, abs=1e-9)
