"""Model FLOPs of a token as NVIDIA publishes them: forward and backward, no recomputation, half of causal scores."""

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.models.build import gpt_spec
from megatron_moe.models.depth import build_block
from megatron_moe.moe.methods import find_method
from megatron_moe.moe.routers.options import parse_options
from megatron_moe.moe.unrouted.unrouted_layer import UnroutedLayer
from megatron_moe.ops.activation import products_of
from megatron_moe.parallel.state import ParallelState

# bf16 dense peaks of the data sheets, by what the device's name contains; the first match counts
PEAKS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def formula_text() -> str:
    """What the log says once, so that figures can be compared."""
    return (
        "FLOPs per token = 3 x forward; forward = sum over layers of attention projections + half of 4 s n_h d_h "
        "(causal; all of it in an encoder) + 6 k h f (gated experts or MLP; 4 without a gate; a memory: twice a key's "
        "width for each key that is scored, 2 h for each value that is read) + shared expert, + cross-attention, "
        "+ 2 h V for the head of the decoder; "
        "routers, norms and embeddings are not counted; MFU = that / data-sheet bf16 dense peak."
    )


def flops_per_token(config: RunConfig, vocab_size: int) -> float:
    """Forward and backward FLOPs of one token, of encoder or decoder. vocab_size: ids before padding."""
    data, model = config.data, config.model
    decoder = _stack(config, config.moe, model.num_layers, data.decoder_length, causal=True)
    total = data.decoder_length * (decoder + 2 * model.hidden_size * vocab_size)
    if model.encoder_num_layers:
        encoder = _stack(config, config.encoder_moe, model.encoder_num_layers, data.seq_length, causal=False)
        total += data.seq_length * encoder + model.num_layers * _cross_attention(config)
    tokens = data.decoder_length + (data.seq_length if model.encoder_num_layers else 0)
    return 3.0 * total / tokens


def _stack(config: RunConfig, moe: MoEConfig, num_layers: int, length: int, *, causal: bool) -> float:
    """Forward FLOPs of a token in all layers of encoder or decoder, whose samples have so many tokens."""
    model = config.model
    hidden, head_dim = model.hidden_size, model.head_dim
    query = model.num_attention_heads * head_dim
    projections = 2 * hidden * (2 * query + 2 * model.groups * head_dim)
    scores = (2 if causal else 4) * length * query  # half of 4 s n_h d_h where half of the pairs are seen
    dense = products_of(model.activation) * hidden * model.ffn_size
    # the router's own number: Switch sends a token to one expert whatever --moe-router-topk says
    method = find_method(moe.router_type)
    choices = method.choices(moe) if moe.num_experts else 0
    sparse: float = products_of(moe.activation or model.activation) * hidden
    sparse *= choices * moe.expert_ffn_size(model.ffn_size)
    if moe.num_experts and issubclass(method, UnroutedLayer):
        sparse = _unrouted(config, moe, length)
    sparse += products_of(model.activation) * hidden * (moe.shared_expert_intermediate_size or 0)
    sparse += dense if moe.extra_ffn != "none" else 0
    sparse_layer = float(projections + scores + sparse)
    if moe.num_experts and getattr(method, "wraps_block", False):
        # a block that works for some tokens, whose keys are those tokens
        share = float(parse_options(method.Options, moe).capacity)
        sparse_layer = share * (projections + share * scores + dense)
    return sum(sparse_layer if is_sparse else projections + scores + dense for is_sparse in moe.moe_layers(num_layers))


def _cross_attention(config: RunConfig) -> float:
    """Forward FLOPs of one layer for one sample: queries and outputs of the decoder, keys and values of the encoder."""
    model, data = config.model, config.data
    query = model.num_attention_heads * model.head_dim
    mine = data.decoder_length * 2 * model.hidden_size * 2 * query
    theirs = data.seq_length * 2 * model.hidden_size * 2 * model.groups * model.head_dim
    return float(mine + theirs + 4 * data.decoder_length * data.seq_length * query)


def _unrouted(config: RunConfig, moe: MoEConfig, length: int) -> float:
    """Forward FLOPs of a layer that says itself what it computes."""
    spec = next(spec for spec in gpt_spec(config, 1).layers if spec.moe is moe)
    layer = build_block(spec, ParallelState.alone()).sparse
    assert isinstance(layer, UnroutedLayer)
    return layer.forward_flops(length)


def peak_flops(device_name: str) -> float | None:
    """Data-sheet bf16 dense FLOP/s of a card, None for one that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
