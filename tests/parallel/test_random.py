"""Draws that depend on who asks and on nothing else."""

import hashlib
import itertools

import pytest
import torch
from scipy import stats

from megatron_moe.parallel.random import KeyedRandom, name_key

MASK = (1 << 64) - 1
KEYS = torch.arange(50_000)
# as this code drew them when it was first released
GOLDEN_BITS = [4506439842410648496, 1311247267545945357, -4349405355853998167]
GOLDEN_UNIFORM = [0.24429459336584303, 0.07108285680694981, 0.7642182632081503]
GOLDEN_NAME = 1594872489587941555


def splitmix64(value: int) -> int:
    """Vigna's splitmix64 with Python's unbounded integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def slow_bits(place: KeyedRandom, key: int) -> int:
    stream = int.from_bytes(hashlib.blake2b(place.stream.encode(), digest_size=8).digest(), "little")
    value = splitmix64(place.seed & MASK)
    for part in (place.step, stream, place.layer, place.pass_index):
        value = splitmix64(value ^ (part & MASK))
    return splitmix64(splitmix64(key & MASK) ^ value)


PLACES = [
    KeyedRandom(0),
    KeyedRandom(1234, step=7, stream="router", layer=3, pass_index=1),
    KeyedRandom(-5, stream="init", layer=name_key("layers.0.mlp.w1")),
]


@pytest.mark.parametrize("place", PLACES)
def test_bits_are_those_of_unbounded_integers(place: KeyedRandom) -> None:
    keys = [0, 1, 2, 12_345_678_901, (1 << 63) - 1, -1]
    found = place.bits(torch.tensor(keys)).tolist()
    assert [value & MASK for value in found] == [slow_bits(place, key) for key in keys]


def test_golden_values_stay_for_ever() -> None:
    """A change here changes every run that is resumed."""
    place = PLACES[1]
    assert [splitmix64(0), splitmix64(1)] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]  # published for splitmix64
    assert place.bits(torch.arange(3)).tolist() == GOLDEN_BITS
    assert place.uniform(torch.arange(3)).tolist() == GOLDEN_UNIFORM
    assert name_key("layers.0.mlp.w1") == GOLDEN_NAME


@pytest.mark.parametrize("place", PLACES)
def test_uniform_is_uniform_and_never_an_end(place: KeyedRandom) -> None:
    drawn = place.uniform(KEYS)
    assert drawn.dtype == torch.float64
    assert 0.0 < float(drawn.min()) and float(drawn.max()) < 1.0
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    # neighbours are independent
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1])) < 0.02


def test_uniform_is_open_at_the_extremes_of_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (0, -1):
        monkeypatch.setattr(KeyedRandom, "bits", lambda self, keys, bits=bits: torch.full_like(keys, bits))
        value = float(KeyedRandom(0).uniform(torch.zeros(1, dtype=torch.int64)))
        assert 0.0 < value <= 1.0 - 2.0**-54


def test_normal_is_normal() -> None:
    drawn = PLACES[1].normal(KEYS)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert bool(drawn.isfinite().all())


def test_a_draw_does_not_depend_on_order_neighbours_or_shape() -> None:
    place = PLACES[1]
    order = torch.tensor([3, 0, 2, 1])
    whole = place.bits(torch.arange(4))
    assert torch.equal(place.bits(order), whole[order])
    assert torch.equal(place.bits(torch.arange(4).view(2, 2)), whole.view(2, 2))
    assert int(place.bits(torch.tensor([2]))[0]) == int(whole[2])
    rows = place.uniform_rows(torch.arange(4), 5)
    assert torch.equal(place.uniform_rows(order, 5), rows[order])
    assert torch.equal(place.uniform_rows(order, 3), rows[order][:, :3])


def test_rows_of_neighbouring_keys_share_nothing() -> None:
    rows = PLACES[0].uniform_rows(torch.arange(300), 40)
    assert len(set(rows.flatten().tolist())) == 300 * 40
    assert stats.kstest(rows.flatten().numpy(), "uniform").pvalue > 1e-3


def test_another_place_draws_other_numbers() -> None:
    start = KeyedRandom(1)
    others = [
        start,
        KeyedRandom(2),
        start.at(step=1),
        start.at(stream="router"),
        start.at(layer=1),
        start.at(pass_index=1),
        start.at(step=1, layer=1),
    ]
    drawn = [place.uniform(KEYS[:5000]) for place in others]
    for left, right in itertools.combinations(drawn, 2):
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 0.06
    # swapping two parts of the place is another place
    assert start.at(step=1, layer=2).key() != start.at(step=2, layer=1).key()


def test_at_changes_only_what_is_said_even_to_nought() -> None:
    place = KeyedRandom(5, step=3, stream="router", layer=2, pass_index=1)
    assert place.at(step=0) == KeyedRandom(5, step=0, stream="router", layer=2, pass_index=1)
    assert place.at() == place
