"""Tiny random models of many architectures, made from their transformers configurations."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 128
H = 32  # residual width
I = 80  # intermediate width  # noqa: E741

_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=H,
    intermediate_size=I,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MHA = _DECODER | dict(num_key_value_heads=4)
_MOE = dict(num_experts_per_tok=2)
_GPT2 = dict(vocab_size=VOCABULARY, n_embd=H, n_inner=I, n_layer=3, n_head=4, n_positions=256)
_ENDS = dict(bos_token_id=1, eos_token_id=2)

# name: (configuration class, model class, keywords)
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _DECODER),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _DECODER),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _DECODER),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _DECODER),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _DECODER),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _DECODER),
    "phi": ("PhiConfig", "PhiForCausalLM", _MHA),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", _DECODER),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _MHA),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", _MHA),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=H, ffn_dim=I, num_hidden_layers=3,
             num_attention_heads=4, word_embed_proj_dim=H, max_position_embeddings=256),
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2 | _ENDS),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT2 | _ENDS),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _GPT2 | _ENDS | dict(rotary_dim=8)),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", _GPT2 | _ENDS | dict(rotary_dim=8)),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=H, intermediate_size=I, num_layers=3,
             num_heads=4, attention_types=[[["global", "local", "global"], 1]],
             max_position_embeddings=256, **_ENDS),
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=H, ffn_hidden_size=I, num_hidden_layers=3,
             num_attention_heads=4, **_ENDS),
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=H, n_layer=3, n_head=4, **_ENDS),
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        dict(vocab_size=VOCABULARY, d_model=H, n_layers=3, n_heads=4, expansion_ratio=3,
             max_seq_len=256),
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(vocab_size=VOCABULARY, d_model=H, d_ff=I, d_kv=8, num_layers=3, num_heads=4,
             decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        _DECODER | dict(layer_types=["conv", "full_attention", "conv"],
                        block_auto_adjust_ff_dim=False, block_ff_dim=I),
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _DECODER | _MOE | dict(num_local_experts=4)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        _DECODER | _MOE | dict(num_experts=4, moe_intermediate_size=48,
                               shared_expert_intermediate_size=64),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _DECODER | _MOE | dict(num_experts=4, moe_intermediate_size=48),
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", _DECODER | _MOE | dict(num_experts=4)),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        _DECODER | _MOE | dict(num_local_experts=4),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _MHA | _MOE | dict(n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=48,
                           first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=16,
                           kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _DECODER | _MOE | dict(num_local_experts=4),
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        _DECODER | dict(num_experts_per_tok=1, num_local_experts=4, intermediate_size_mlp=I,
                        interleave_moe_layer_step=2),
    ),
    "jetmoe": (
        "JetMoeConfig",
        "JetMoeForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=H, intermediate_size=48, num_hidden_layers=3,
             num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
             max_position_embeddings=256, pad_token_id=0, **_ENDS),
    ),
    "dbrx": (
        "DbrxConfig",
        "DbrxForCausalLM",
        dict(vocab_size=VOCABULARY, d_model=H, n_heads=4, n_layers=3, max_seq_len=256,
             attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
             ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)),
    ),
}  # fmt: skip

# The rest of the families: found and checked in tests/models/test_more_architectures.py.
_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
_QWEN_NEXT = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8,
)  # fmt: skip
_EXPERTS = _MOE | dict(num_experts=4, moe_intermediate_size=48)
_ROUTED = _MOE | dict(n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=48)
_BERT = dict(vocab_size=VOCABULARY, hidden_size=H, intermediate_size=I, num_hidden_layers=3,
             num_attention_heads=4, is_decoder=True, pad_token_id=0)  # fmt: skip

MORE_ARCHITECTURES = {
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _DECODER),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _DECODER | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "gemma4_moe": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _DECODER | dict(enable_moe_block=True, num_experts=4, top_k_experts=2,
                        moe_intermediate_size=48, hidden_size_per_layer_input=8,
                        vocab_size_per_layer_input=VOCABULARY, global_head_dim=8,
                        layer_types=["sliding_attention", "sliding_attention", "full_attention"]),
    ),
    "olmo3": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        _DECODER | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _DECODER | _QWEN_NEXT),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", _DECODER),
    "cohere2": (
        "Cohere2Config",
        "Cohere2ForCausalLM",
        _DECODER | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _DECODER),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", _DECODER),
    "bamba": ("BambaConfig", "BambaForCausalLM", _DECODER | _MAMBA | dict(attn_layer_indices=[1])),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        _DECODER | _MOE | dict(num_experts=4, attn_layer_period=2, attn_layer_offset=1,
                               expert_layer_period=2, expert_layer_offset=1,
                               use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4),
    ),
    "minimax": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        _DECODER | _MOE | dict(num_local_experts=4, block_size=16, layer_types=[
            "full_attention", "linear_attention", "full_attention"]),
    ),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", _DECODER | _MOE | dict(num_local_experts=4)),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        _DECODER | _QWEN_NEXT | _EXPERTS | dict(shared_expert_intermediate_size=64),
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        _DECODER | _QWEN_NEXT | _EXPERTS | dict(shared_expert_intermediate_size=64),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _MHA | _ROUTED | dict(first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=16,
                              kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                              v_head_dim=8),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        _DECODER | _ROUTED | dict(first_k_dense_replace=1, n_group=1, topk_group=1),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        _DECODER | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=48,
                        moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=2,
                        moe_layer_interval=1),
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        _DECODER | _EXPERTS | dict(layer_types=["conv", "full_attention", "conv"],
                                   num_dense_layers=1),
    ),
    "hunyuan_moe": (
        "HunYuanMoEV1Config",
        "HunYuanMoEV1ForCausalLM",
        _DECODER | dict(num_experts=4, moe_topk=2),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _MHA | dict(layers_block_type=["mamba", "moe", "attention", "mlp"], n_routed_experts=4,
                    num_experts_per_tok=2, moe_intermediate_size=48,
                    moe_shared_expert_intermediate_size=40, mamba_num_heads=4, mamba_head_dim=16,
                    ssm_state_size=8, n_groups=1, num_hidden_layers=4, n_group=1, topk_group=1),
    ),
    "aria": (
        "AriaTextConfig",
        "AriaTextForCausalLM",
        _DECODER | dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        dict(vocab_size=VOCABULARY, hidden_size=H, ffn_hidden_size=I, expert_ffn_hidden_size=48,
             num_layers=2, num_attention_heads=4, n_routed_experts=4, zero_expert_num=2,
             moe_topk=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
             v_head_dim=8, head_dim=8, max_position_embeddings=256, pad_token_id=0, **_ENDS),
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        _DECODER | dict(layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
                        num_hidden_layers=4, num_mem_blocks=1, mamba_d_state=8, n_mamba_heads=4,
                        mamba_headdim=16, head_dim=16, adapter_rank=4, num_key_value_heads=4,
                        use_mamba_kernels=False),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        _MHA | dict(lru_width=H, attention_window_size=16),
    ),
    "bert": ("BertConfig", "BertLMHeadModel", _BERT),
    "switch_transformers": (
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        dict(vocab_size=VOCABULARY, d_model=H, d_ff=I, d_kv=8, num_layers=2, num_decoder_layers=2,
             num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=4, num_experts=4,
             decoder_start_token_id=0, expert_capacity=64),
    ),
    "nllb_moe": (
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        dict(vocab_size=VOCABULARY, d_model=H, encoder_layers=2, decoder_layers=2,
             encoder_ffn_dim=I, decoder_ffn_dim=I, encoder_attention_heads=4,
             decoder_attention_heads=4, num_experts=4, encoder_sparse_step=2,
             decoder_sparse_step=2, decoder_start_token_id=2, max_position_embeddings=256,
             expert_capacity=64),
    ),
}  # fmt: skip

MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "gpt_oss",
    "llama4", "jetmoe", "dbrx",
)  # fmt: skip


# Without nllb_moe: which experts a token goes to depends there on the order of the tokens.
MORE_MIXTURES = (
    "gemma4_moe", "jamba", "minimax", "phimoe", "qwen3_next", "qwen3_5_moe", "deepseek_v2",
    "glm4_moe", "ernie4_5_moe", "lfm2_moe", "hunyuan_moe", "nemotron_h", "aria", "longcat_flash",
    "switch_transformers",
)  # fmt: skip


def tiny_model(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """Return a random model of architecture ``name``, in eval mode, float32."""
    config_name, model_name, keywords = (ARCHITECTURES | MORE_ARCHITECTURES)[name]
    config = getattr(transformers, config_name)(**(keywords | changes))
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(config).eval()


def token_ids(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Return random token ids [batch, length] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def run(model: torch.nn.Module, ids: torch.Tensor, **keywords):
    """Run the model; encoder-decoders get the ids on both sides."""
    if getattr(model.config, "is_encoder_decoder", False):
        keywords["decoder_input_ids"] = ids
    return model(input_ids=ids, use_cache=False, **keywords)
