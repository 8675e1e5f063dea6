"""What a tiny configuration looks like: sizes by field name, and what single families need beside them."""

from __future__ import annotations

from typing import Any

VOCAB = 128
EXPERTS = 6
TOP_K = 2

TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "depth": 1,
    # feed-forward
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "prefix_dense_intermediate_size": 48,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "share_expert_dim": 24,
    "moe_hidden_size": 16,
    "hidden_size_per_layer_input": 8,
    "router_hidden_size": 16,
    # attention
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "swa_num_attention_heads": 4,
    "num_sliding_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "max_position_embeddings": 128,
    "max_seq_len": 128,
    "model_max_length": 128,
    # linear attention and state spaces
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "block_size": 8,
    # experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "moe_top_k": TOP_K,
    "top_k_experts": TOP_K,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 1,
    "num_nextn_predict_layers": 0,
    # what would make two runs differ
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "moe_jitter_eps": None,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "moe_token_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Field → value, for every configuration that has the field.  Fields that a configuration lacks are left out."""

BYTES = 259
"""Vocabulary of the small configurations: 256 bytes, then bos, eos and pad."""

SMALL: dict[str, Any] = {
    **TINY,
    "vocab_size": BYTES,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
"""Like `TINY`, for models that learn bytes in minutes on two cores."""

MAIN: tuple[str, ...] = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
"""Families that have a small configuration too, and that CI checks."""

SIZES: dict[str, dict[str, Any]] = {"tiny": TINY, "small": SMALL}

GROUPED: dict[str, Any] = {"n_group": 2, "num_expert_group": 2, "topk_group": 1}
"""For families whose router picks groups of experts before it picks experts."""

FAMILIES: dict[str, dict[str, Any]] = {
    "aria": {"config": {"moe_num_shared_experts": 1}},
    "bailing_hybrid": {"config": {"layer_types": ["linear_attention", "full_attention"]}},
    "dbrx": {
        "config": {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
        }
    },
    "deepseek_ocr2": {
        "config": {
            "text_config": {"mlp_layer_types": ["sparse", "sparse"]},
            "vision_config": {
                "sam_config": {
                    "output_channels": 8,
                    "num_attention_heads": 4,
                    "image_size": 64,
                    "mlp_dim": 48,
                    "downsample_channels": [8, 32],
                    "global_attn_indexes": [0],
                },
            },
        }
    },
    "deepseek_v4": {
        "config": {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "num_key_value_heads": 1,
            "o_groups": 2,
            "partial_rotary_factor": 0.5,
        }
    },
    "diffusion_gemma": {
        "class": "DiffusionGemmaForBlockDiffusion",
        "config": {
            "canvas_length": 4,
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "position_embedding_size": 16,
            },
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 8,
                "final_logit_softcapping": 30.0,
            },
        },
    },
    # keys of the product-key lookup: a square number of experts
    "doge": {"config": {"is_moe": True, "num_experts": 36, "num_experts_per_tok": 4}},
    "dots1": {"config": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}},
    "dots3_note": {
        "config": {
            "layer_types": ["indexed_attention", "sliding_attention"],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        }
    },
    "ernie4_5_vl_moe": {
        "config": {
            "text_config": {
                "moe_intermediate_size": [24, 16],
                "mlp_layer_types": ["sparse", "sparse"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            }
        }
    },
    "gemma4": {
        "config": {
            "enable_moe_block": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 8,
        }
    },
    "glm4v_moe": {
        "config": {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {"out_hidden_size": 32, "image_size": 28},
        }
    },
    "glm5_next": {
        "config": {
            "text_config": {"index_kpool": 2, "qk_rope_head_dim": 0},
            "vision_config": {"out_hidden_size": 32, "image_size": 28, "projection_intermediate_size": 48},
        }
    },
    "gpt_oss": {"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}},
    "granitemoehybrid": {"config": {"layer_types": ["linear_attention", "full_attention"]}},
    "jamba": {
        "config": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
    },
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention"]}},
    "longcat_flash": {"config": {"zero_expert_num": 3, "head_dim": 8}},
    "mistral_large4": {
        "config": {
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 48,
                "patch_size": 4,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 16,
            }
        }
    },
    "muse_spark": {
        "config": {
            "out_hidden_size": 32,
            "projector_hidden_size": 48,
            "vision_config": {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
            "audio_config": {
                "patch_sizes": [2],
                "hidden_sizes": [32],
                "depths": [1],
                "num_hidden_layers": 1,
                "out_hidden_size": 32,
            },
        }
    },
    "nemotron_h": {"config": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}},
    "nllb_moe": {
        "config": {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
        }
    },
    # in eval mode a threshold and no noise; at zero the router's gradient would vanish
    "phimoe": {"config": {"router_jitter_noise": 0.2}},
    "qwen3_omni_moe": {
        "class": "Qwen3OmniMoeThinkerForConditionalGeneration",
        "config": {
            "vision_start_token_id": 126,
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "output_dim": 32,
                "downsample_hidden_size": 8,
            },
            "vision_config": {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    },
    "qwen3_vl_moe": {
        "config": {
            "vision_config": {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        }
    },
    "qwen4_exp": {
        "config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
            "ple_embed_dim": 32,
            "ngram_vocab_size_base": 50,
            "heads_per_ngram": 2,
            "split_ngram_parts": 1,
        }
    },
    "step3p7": {"config": {"vision_config": {"patch_size": 4, "image_size": 16, "max_position_embeddings": 16}}},
    "switch_transformers": {
        "config": {
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "d_kv": 8,
            "d_ff": 24,
        }
    },
    "unlimited_ocr": {
        "config": {
            "vision_config": {
                "sam_config": {
                    "output_channels": 8,
                    "image_size": 64,
                    "mlp_dim": 48,
                    "downsample_channels": [8, 32],
                    "global_attn_indexes": [0],
                },
                "encoder_config": {"image_size": 32},
            },
        }
    },
    "zaya": {"config": {"num_experts_per_tok": 1}},
}
"""Family → ``class`` (where the automatic choice is wrong) and ``config`` (fields beyond `TINY`; a sub-configuration's
fields under its name)."""

EVAL_GRADIENTS = frozenset({"phimoe"})
"""Families whose router draws random numbers in train mode: their gradients are compared in eval mode."""

NO_GENERATE: dict[str, str] = {
    "openai_privacy_filter": "a token classifier, it does not generate",
}
"""Families without ``generate``, and why."""

GENERATE: dict[str, dict[str, Any]] = {
    "diffusion_gemma": {"max_new_tokens": 4, "max_denoising_steps": 3, "cache_implementation": None},
}
"""Keyword arguments of ``generate`` that differ from those of the other families."""
