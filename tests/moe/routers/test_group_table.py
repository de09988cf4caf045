"""The table of a routing group: ordered by key, the same on every rank, and the way back."""

from typing import Any

import torch
from moe_rows import NOBODY, rows_of, token_info, tp_state
from ranks import run_on_ranks

from megatron_moe.moe.plan import TokenInfo
from megatron_moe.moe.routers.group_table import GroupTable, group_table

PADDING = [(3, 0), (2, 4), (3, 4)]


def info() -> TokenInfo:
    # groups of two samples, and one of a single sample
    return token_info(4, 5, group_samples=2, padding=PADDING)


def scores() -> torch.Tensor:
    return torch.arange(60, dtype=torch.float64).view(20, 3)


def test_lines_stand_by_group_and_key_whatever_the_order_of_rows() -> None:
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    table = group_table(scores()[shuffle], rows_of(info(), shuffle), NOBODY, absent=-1.0)
    assert table.scores.shape == (3, 8, 3)
    # position-major: token (position p, sample s) has row 5 p + s
    assert table.scores[0, :6, 0].tolist() == [0.0, 3.0, 15.0, 18.0, 30.0, 33.0]
    assert table.scores[0, 6:, 0].tolist() == [-1.0, 48.0]
    # the last group has one sample of four tokens, of which two are padding, and four empty places
    assert table.scores[2, :, 0].tolist() == [12.0, 27.0] + [-1.0] * 6
    assert table.is_token.sum(dim=1).tolist() == [7, 8, 2]
    assert not table.is_token[2, 2:].any()
    assert shuffle[table.rows[1, 3]] == 8
    assert table.rows[2, 4:].tolist() == [-1] * 4


def test_what_was_decided_for_a_place_comes_back_to_its_token() -> None:
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    table = group_table(scores()[shuffle], rows_of(info(), shuffle), NOBODY, absent=-1.0)
    padding = info().is_padding[shuffle]
    assert torch.equal(table.local(table.scores), scores()[shuffle].masked_fill(padding[:, None], -1.0))
    assert torch.equal(table.local(table.is_token), ~padding)


def on_rank(rank: int, world_size: int) -> tuple[list[Any], list[Any], list[int]]:
    rows = (torch.tensor([0, 2, 2, 0, 2])[torch.arange(20) % 5] == rank).nonzero()[:, 0].flip(0)
    table = group_table(scores()[rows], rows_of(info(), rows), tp_state(rank, world_size).tp_cp)
    mine = (table.rows >= 0) & (table.rows < len(rows))
    owned = rows[table.rows[mine]] if len(rows) else rows
    assert torch.equal(table.scores[mine & table.is_token][:, 0], scores()[owned, 0][~info().is_padding[owned]])
    return table.scores.tolist(), table.local(table.scores).tolist(), rows.tolist()


def test_every_rank_holds_the_same_table_and_finds_its_own_rows() -> None:
    whole: GroupTable = group_table(scores(), info(), NOBODY)
    expected = whole.local(whole.scores)
    answers = run_on_ranks(3, on_rank)
    assert sorted(row for _, _, rows in answers for row in rows) == list(range(20))
    for table, local, rows in answers:
        assert table == whole.scores.tolist()
        assert local == expected[rows].tolist()
