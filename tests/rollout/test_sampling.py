import numpy as np

from rlhf.rollout.sampling import seed_of, streams, uniforms


def test_the_generator_is_splitmix64():
    zero = np.zeros(1, np.uint64)  # the reference generator's first outputs for seed 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniforms(zero, position)[0] for position in range(3)] == [(x >> 11) * 2.0**-53 for x in expected]


def test_neither_batch_nor_order_changes_a_samples_numbers():
    together = streams([7, 8, 9], 4)
    assert np.array_equal(together[4:8], streams([8], 4))
    assert np.array_equal(together[:2], streams([7], 2))
    assert uniforms(together, 5)[6] == uniforms(together[6:7], 5)[0]


def test_seeds_of_neighbouring_prompts_and_steps_share_no_stream():
    keys = np.concatenate([streams([seed_of(seed, index)], 8) for seed in range(50) for index in range(50)])
    assert len(set(keys.tolist())) == 50 * 50 * 8


def test_draws_are_uniform_along_samples_and_along_positions():
    keys = streams(range(100), 100)
    for draws in (uniforms(keys, 0), np.array([uniforms(keys[:1], position)[0] for position in range(10000)])):
        assert draws.min() >= 0 and draws.max() < 1
        counts = np.bincount((draws * 10).astype(int), minlength=10)
        assert ((counts - 1000) ** 2 / 1000).sum() < 33.7  # chi-squared, 9 degrees of freedom: p = 0.0001


def test_a_seed_fits_a_signed_64_bit_integer():
    assert all(0 <= seed_of(seed, index) < 2**63 for seed in (0, 2**64 - 1) for index in range(1000))
