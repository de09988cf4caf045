"""Which option somebody meant who wrote another word."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

# How the same thing is called elsewhere: Hugging Face configurations, papers, shell habits.
OTHER_NAMES = {
    "tp": "tensor_model_parallel_size",
    "tp_size": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "pp_size": "pipeline_model_parallel_size",
    "vpp": "num_virtual_stages_per_pipeline_rank",
    "vpp_size": "num_virtual_stages_per_pipeline_rank",
    "virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank",
    "cp": "context_parallel_size",
    "cp_size": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "ep_size": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "etp_size": "expert_tensor_parallel_size",
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "d_ff": "ffn_hidden_size",
    "head_dim": "kv_channels",
    "num_key_value_heads": "num_query_groups",
    "num_kv_heads": "num_query_groups",
    "rope_theta": "rotary_base",
    "rms_norm_eps": "norm_epsilon",
    "layernorm_epsilon": "norm_epsilon",
    "hidden_act": "activation",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "untie_embeddings_and_output_weights",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "router_topk",
    "top_k": "router_topk",
    "k": "router_topk",
    "router_aux_loss_coef": "aux_loss_coeff",
    "capacity_factor": "expert_capacity_factor",
    "learning_rate": "lr",
    "max_steps": "train_iters",
    "num_steps": "train_iters",
    "steps": "train_iters",
    "batch_size": "global_batch_size",
    "max_seq_len": "seq_length",
    "sequence_length": "seq_length",
    "context_length": "seq_length",
    "grad_clip": "clip_grad",
    "max_grad_norm": "clip_grad",
    "gradient_clipping": "clip_grad",
    "betas": "adam_beta1",
    "iters": "train_iters",
    "shared_expert_size": "shared_expert_intermediate_size",
    "use_rope": "position_embedding_type",
    "rope": "position_embedding_type",
    "zero": "data_parallel_sharding_strategy",
    "zero1": "data_parallel_sharding_strategy",
    "zero3": "data_parallel_sharding_strategy",
    "fsdp": "data_parallel_sharding_strategy",
    "bfloat16": "bf16",
    "recipe": "config",
    "resume": "load",
    "load_dir": "load",
    "save_dir": "save",
    "output_dir": "save",
    "save_every": "save_interval",
    "save_steps": "save_interval",
    "eval_every": "eval_interval",
    "eval_steps": "eval_interval",
    "log_every": "log_interval",
    "logging_steps": "log_interval",
    "schedule": "pipeline_schedule",
    "backend": "distributed_backend",
}

# Flags that Megatron's users type and that are not here, with what to do instead.
MEGATRON_FLAGS = {
    "--disable-bias-linear": "no linear layer here has a bias; leave it out",
    "--use-mcore-models": "there is one implementation; leave it out",
    "--group-query-attention": "--num-query-groups says it alone; leave it out",
    "--moe-grouped-gemm": "experts are always one grouped product; leave it out",
    "--moe-router-load-balancing-type": "say how to balance with --moe-router-type and --moe-aux-loss-coeff",
    "--moe-router-dtype": "routers always compute in float32 or wider; leave it out",
    "--accumulate-allreduce-grads-in-fp32": "gradients are always summed in float32 or wider; leave it out",
    "--fp16": "use --bf16",
    "--use-torch-fsdp2": "give --data-parallel-sharding-strategy optim_grads_params",
    "--use-megatron-fsdp": "give --data-parallel-sharding-strategy optim_grads_params",
    "--exit-signal-handler": "SIGTERM and SIGUSR1 always save and exit; leave it out",
    "--ckpt-format": "there is one format; leave it out",
    "--auto-detect-ckpt-format": "there is one format; leave it out",
    "--lr-warmup-fraction": "give the steps with --lr-warmup-iters",
    "--attention-dropout": "there is no dropout; leave it out",
    "--hidden-dropout": "there is no dropout; leave it out",
    "--encoder-seq-length": "give --seq-length, which is the encoder's where there is one",
    "--decoder-seq-length": "it follows from --seq-length and the noise, so that nothing is padded; leave it out",
    "--mask-prob": "give the share of noise with --noise-density",
    "--save-retain-interval": "give the number of checkpoints to keep with --keep",
    "--check-weight-hash-across-dp-replicas-interval": "give --check-replicas-interval, which compares more than that",
    "--yaml-cfg": "write a recipe in TOML and give it with --config",
}


# no option is as long, and comparing takes as the square of the length
LONGEST_WORD = 80


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """ "; did you mean 'router_topk'?", or nothing when no name is near."""
    name = nearest(word, names)
    return f"; did you mean '{name}'?" if name else ""


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name most like the word, spelt with dashes or underscores; None when none is much like it."""
    if len(word) > LONGEST_WORD:
        return None
    plain = _plain(word)
    best, best_score = None, 0.0
    for name in names:
        score = _likeness(plain, _plain(name))
        if score > best_score:
            best, best_score = name, score
    return best if best_score >= 0.68 else None


def _likeness(word: str, name: str) -> float:
    """0 (nothing in common) to 1 (the same): by letters, or by the parts of the word that the name has."""
    meant = OTHER_NAMES.get(word) or OTHER_NAMES.get(word.removeprefix("moe_"))
    if word == name:
        return 1.0
    if meant is not None and name in (meant, f"moe_{meant}"):
        return 0.99
    letters = SequenceMatcher(None, word, name).ratio()
    parts, name_parts = word.split("_"), name.split("_")
    found = [max(SequenceMatcher(None, part, other).ratio() for other in name_parts) for part in parts]
    # Each part must be in the name, letter slips allowed; among such names the shortest is meant.
    covered = min(found) >= 0.8
    by_parts = 0.7 + 0.2 * letters if covered else 0.0
    return max(letters, by_parts)


def _plain(name: str) -> str:
    """A flag, a key in any spelling, as words joined by underscores."""
    return name.strip().lstrip("-").replace("-", "_").replace(".", "_").lower()
