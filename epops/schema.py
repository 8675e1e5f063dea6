"""What every op looks like: one literal schema an op, and nothing else.

Rules (docs/architecture.md, Ops): results are fresh tensors; sizes are SymInts; an absent result is an empty tensor, so
that an op has the same arity in every layout; every fact that a fake kernel needs is an argument; no pointers and no ids.
"""

from __future__ import annotations

SCHEMAS: dict[str, str] = {
    # ---- dispatch: token rows to the ranks of their experts ----------------------------------------------------
    "dispatch": (
        "dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor? x_scales=None, *, str group, "
        "int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt capacity, str layout, int alignment, "
        "float grad_scale=1.0, int lane=0) -> (Tensor rows, Tensor scales, Tensor row_weights, Tensor row_expert, "
        "Tensor row_source, Tensor expert_counts, Tensor expert_ends, Tensor route, Tensor status)"
    ),
    "dispatch_start": (
        "dispatch_start(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor? x_scales=None, *, str group, "
        "int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt capacity, str layout, int alignment, "
        "float grad_scale=1.0, int lane=0) -> Tensor ticket"
    ),
    "dispatch_wait": (
        "dispatch_wait(Tensor ticket, Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor? x_scales=None, *, "
        "str group, int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt capacity, str layout, "
        "int alignment, float grad_scale=1.0, int lane=0) -> (Tensor rows, Tensor scales, Tensor row_weights, "
        "Tensor row_expert, Tensor row_source, Tensor expert_counts, Tensor expert_ends, Tensor route, Tensor status)"
    ),
    # ---- the quantizing dispatch: casts while sending, the wire carries fp8 and scales ---------------------------
    "dispatch_quant": (
        "dispatch_quant(Tensor x, Tensor topk_idx, Tensor topk_weights, *, str group, int num_experts, int num_slots, "
        "int ep_size, SymInt max_tokens, SymInt capacity, str layout, int alignment, ScalarType quant_dtype, int block, "
        "str scale_format, str scale_layout, str scale_math, str eps_on, float eps, bool clamp, "
        "float grad_scale=1.0, int lane=0) -> (Tensor rows, Tensor scales, Tensor row_weights, Tensor row_expert, "
        "Tensor row_source, Tensor expert_counts, Tensor expert_ends, Tensor route, Tensor status)"
    ),
    "dispatch_quant_start": (
        "dispatch_quant_start(Tensor x, Tensor topk_idx, Tensor topk_weights, *, str group, int num_experts, "
        "int num_slots, int ep_size, SymInt max_tokens, SymInt capacity, str layout, int alignment, "
        "ScalarType quant_dtype, int block, str scale_format, str scale_layout, str scale_math, str eps_on, float eps, "
        "bool clamp, float grad_scale=1.0, int lane=0) -> Tensor ticket"
    ),
    "dispatch_quant_wait": (
        "dispatch_quant_wait(Tensor ticket, Tensor x, Tensor topk_idx, Tensor topk_weights, *, str group, "
        "int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt capacity, str layout, int alignment, "
        "ScalarType quant_dtype, int block, str scale_format, str scale_layout, str scale_math, str eps_on, float eps, "
        "bool clamp, float grad_scale=1.0, int lane=0) -> (Tensor rows, Tensor scales, Tensor row_weights, "
        "Tensor row_expert, Tensor row_source, Tensor expert_counts, Tensor expert_ends, Tensor route, Tensor status)"
    ),
    # ---- the gradient of dispatch: row gradients summed back to their tokens ---------------------------------------
    "dispatch_backward": (
        "dispatch_backward(Tensor grad_rows, Tensor? grad_row_weights, Tensor route, *, str group, int num_experts, "
        "int num_slots, int ep_size, SymInt max_tokens, SymInt num_tokens, int top_k, str layout, "
        "float grad_scale=1.0, int lane=0) -> (Tensor grad_x, Tensor grad_topk_weights, Tensor status)"
    ),
    "dispatch_backward_start": (
        "dispatch_backward_start(Tensor grad_rows, Tensor? grad_row_weights, Tensor route, *, str group, "
        "int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt num_tokens, int top_k, str layout, "
        "float grad_scale=1.0, int lane=0) -> Tensor ticket"
    ),
    "dispatch_backward_wait": (
        "dispatch_backward_wait(Tensor ticket, Tensor grad_rows, Tensor? grad_row_weights, Tensor route, *, str group, "
        "int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt num_tokens, int top_k, str layout, "
        "float grad_scale=1.0, int lane=0) -> (Tensor grad_x, Tensor grad_topk_weights, Tensor status)"
    ),
    # ---- combine: weighted rows back to their tokens, plus an addend ------------------------------------------------
    "combine": (
        "combine(Tensor y, Tensor route, Tensor? row_weights=None, Tensor? addend=None, Tensor? y_scales=None, *, "
        "str group, int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt num_tokens, int top_k, "
        "str layout, ScalarType out_dtype, float out_scale=1.0, float addend_scale=1.0, float grad_scale=1.0, "
        "int lane=0) -> (Tensor out, Tensor status)"
    ),
    "combine_start": (
        "combine_start(Tensor y, Tensor route, Tensor? row_weights=None, Tensor? y_scales=None, *, str group, "
        "int num_experts, int num_slots, int ep_size, SymInt max_tokens, SymInt num_tokens, int top_k, str layout, "
        "ScalarType out_dtype, float out_scale=1.0, float grad_scale=1.0, int lane=0) -> Tensor ticket"
    ),
    "combine_wait": (
        "combine_wait(Tensor ticket, Tensor y, Tensor route, Tensor? row_weights=None, Tensor? addend=None, "
        "Tensor? y_scales=None, *, str group, int num_experts, int num_slots, int ep_size, SymInt max_tokens, "
        "SymInt num_tokens, int top_k, str layout, ScalarType out_dtype, float out_scale=1.0, float addend_scale=1.0, "
        "float grad_scale=1.0, int lane=0) -> (Tensor out, Tensor status)"
    ),
    # ---- the gradient of combine: token gradients out to the rows ----------------------------------------------------
    "combine_backward": (
        "combine_backward(Tensor grad_out, Tensor y, Tensor route, Tensor? row_weights=None, Tensor? y_scales=None, *, "
        "str group, int num_experts, int num_slots, int ep_size, SymInt max_tokens, int top_k, str layout, "
        "float out_scale=1.0, float grad_scale=1.0, int lane=0) -> (Tensor grad_y, Tensor grad_row_weights, "
        "Tensor status)"
    ),
    "combine_backward_start": (
        "combine_backward_start(Tensor grad_out, Tensor y, Tensor route, Tensor? row_weights=None, "
        "Tensor? y_scales=None, *, str group, int num_experts, int num_slots, int ep_size, SymInt max_tokens, "
        "int top_k, str layout, float out_scale=1.0, float grad_scale=1.0, int lane=0) -> Tensor ticket"
    ),
    "combine_backward_wait": (
        "combine_backward_wait(Tensor ticket, Tensor grad_out, Tensor y, Tensor route, Tensor? row_weights=None, "
        "Tensor? y_scales=None, *, str group, int num_experts, int num_slots, int ep_size, SymInt max_tokens, "
        "int top_k, str layout, float out_scale=1.0, float grad_scale=1.0, int lane=0) -> (Tensor grad_y, "
        "Tensor grad_row_weights, Tensor status)"
    ),
    # ---- all_to_all: ragged exchange, splits on the device, one dim scattered and another gathered --------------------
    "plan_all_to_all": (
        "plan_all_to_all(Tensor input_splits, Tensor? output_splits=None, *, str group, int ep_size, int lane=0) "
        "-> (Tensor plan, Tensor status)"
    ),
    "all_to_all": (
        "all_to_all(Tensor x, Tensor? input_splits=None, Tensor? output_splits=None, Tensor? plan=None, *, str group, "
        "int ep_size, SymInt out_size, SymInt scatter_size, int scatter_dim=0, int gather_dim=0, int lane=0) "
        "-> (Tensor rows, Tensor counts, Tensor status)"
    ),
    "all_to_all_start": (
        "all_to_all_start(Tensor x, Tensor? input_splits=None, Tensor? output_splits=None, Tensor? plan=None, *, "
        "str group, int ep_size, SymInt out_size, SymInt scatter_size, int scatter_dim=0, int gather_dim=0, "
        "int lane=0) -> Tensor ticket"
    ),
    "all_to_all_wait": (
        "all_to_all_wait(Tensor ticket, Tensor x, Tensor? input_splits=None, Tensor? output_splits=None, "
        "Tensor? plan=None, *, str group, int ep_size, SymInt out_size, SymInt scatter_size, int scatter_dim=0, "
        "int gather_dim=0, int lane=0) -> (Tensor rows, Tensor counts, Tensor status)"
    ),
    # ---- what the model seam needs beside the exchanges ------------------------------------------------------------------
    "grouped_mm": "grouped_mm(Tensor rows, Tensor weight, Tensor expert_ends, Tensor? bias=None) -> Tensor",
    "grouped_mm_backward_weight": (
        "grouped_mm_backward_weight(Tensor grad, Tensor rows, Tensor expert_ends) -> Tensor"
    ),
    "scaled_grouped_mm": (
        "scaled_grouped_mm(Tensor rows, Tensor weight, Tensor expert_ends, Tensor row_scales, Tensor weight_scales) "
        "-> Tensor"
    ),
    "map_rows": "map_rows(Tensor[] inputs, Tensor expert_ends, *, str program) -> Tensor[]",
    "all_reduce": "all_reduce(Tensor x, *, str group, int ep_size) -> Tensor",
    "gather_tokens": "gather_tokens(Tensor x, *, str group, int ep_size, SymInt num_tokens) -> Tensor",
}
"""Op name → schema, forward before backward, dispatch before combine."""

EXCHANGES: tuple[str, ...] = tuple(
    name
    for name in SCHEMAS
    if name not in ("grouped_mm", "grouped_mm_backward_weight", "scaled_grouped_mm", "map_rows")
)
"""Ops that talk to other ranks: their order must be the same on every rank of a group."""
