"""Our product-key memory gives product-key-memory's answers on the same weights."""

import pytest
import torch
from layers.contexts import context
from moe.unrouted.memories import make_memory
from moe_rows import token_info

from megatron_moe.parallel.state import ParallelState

HEADS, SUB_KEYS, HALF, KNN, HIDDEN = 2, 4, 3, 3, 6


@pytest.mark.parametrize("seed", range(4))
def test_answers_of_product_key_memory(seed: int) -> None:
    package = pytest.importorskip("product_key_memory")
    torch.manual_seed(seed)
    theirs = package.PKM(HIDDEN, heads=HEADS, num_keys=SUB_KEYS, topk=KNN, dim_head=HALF).double()
    theirs.norm = torch.nn.Identity()  # it normalises the halves of a query apart
    options = {"heads": str(HEADS), "key_dim": str(2 * HALF), "knn": str(KNN), "query_norm": "none"}
    ours = make_memory({"router_type": "product_keys", "router_options": options})
    with torch.no_grad():
        # theirs: (half, head, width, H), (head, n, half, width); ours: (head, half, width, H), (head, half, n, width)
        queries = theirs.to_queries.weight.view(2, HEADS, HALF, HIDDEN).transpose(0, 1)
        ours.get_parameter("query").copy_(queries.reshape(-1, HIDDEN))
        ours.get_parameter("sub_keys").copy_(theirs.keys.transpose(1, 2))
        ours.get_parameter("values").copy_(theirs.values.weight)
    tokens = torch.randn(7, HIDDEN, dtype=torch.float64)
    found = ours.mix(tokens, token_info(7), context(7, 1, ParallelState.alone())).answers
    torch.testing.assert_close(found, theirs(tokens[None])[0])
