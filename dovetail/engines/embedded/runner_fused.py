"""Runs Llama, Qwen2 and Qwen3 shaped models without their modules: fewer, larger operations.

Per layer: one product for queries, keys and values, one for gate and up, rotation of queries and
keys together, keys and values written once into the row, shared prompts read once per group.

Shapes: N rows, T packed tokens, H hidden, Q query heads, K kv heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dovetail.engines.embedded.attention import Scratch, attend_prefixes, attend_rows
from dovetail.engines.embedded.batch import RowBatch
from dovetail.engines.embedded.fuse import FusedLayer, fuse_layers
from dovetail.engines.embedded.kv_cache import KVCache
from dovetail.engines.embedded.runner_generic import write_piece
from dovetail.engines.embedded.scheduler import Piece

_PACKED_TOKENS = 4096


class FusedRunner:
    """Prefill and decode on joined weights.

    Args:
        positions: the rotation table covers `[0, positions)`.
    """

    cascade = True

    def __init__(self, model: PreTrainedModel, cache: KVCache, positions: int) -> None:
        config: Any = model.config
        self._model = model
        self.cache = cache
        self._query_heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._head_dim = cache.shapes[0].key_dim
        self._eps = config.rms_norm_eps
        self._layers = fuse_layers(model)
        self.weights_at: tuple[int, ...] = ()
        """Where the weights lie, as of the last `begin`; what was captured elsewhere is stale."""
        self._scale = self._layers[0].module.self_attn.scaling
        self._has_head_norm = hasattr(self._layers[0].module.self_attn, "q_norm")
        self._scratch = Scratch()
        self._cos, self._sin = self._rotation(positions)

    def guard(self) -> AbstractContextManager[Any]:
        """Nothing made during a step outlives it."""
        return torch.inference_mode()

    def begin(self) -> None:
        """Generation starts: weights that were re-pointed meanwhile are joined again."""
        for layer in self._layers:
            layer.refresh()
        self.weights_at = tuple(p.data_ptr() for p in self._model.parameters())

    def end(self) -> None:
        """Nothing to undo."""

    def prefill(self, pieces: Seq[Piece]) -> None:
        """Compute and store the keys and values of these pieces."""
        packed: list[Piece] = []
        count = 0
        for piece in pieces:
            if packed and count + len(piece.tokens) > _PACKED_TOKENS:
                self._prefill(packed)
                packed, count = [], 0
            packed.append(piece)
            count += len(piece.tokens)
        if packed:
            self._prefill(packed)

    def decode(self, batch: RowBatch) -> Tensor:
        """One token per row; returns logits [N, V] float32."""
        rotation = self._cos[batch.positions][:, None], self._sin[batch.positions][:, None]
        mask = batch.visible() if batch.ragged else None
        x = functional.embedding(batch.tokens, self._model.model.embed_tokens.weight)
        n, groups = batch.size, batch.groups
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, x, rotation)
            row_keys, row_values = self.cache.rows(index, n, batch.longest)
            row_keys[batch.rows, :, batch.kv_lengths] = keys
            row_values[batch.rows, :, batch.kv_lengths] = values
            queries = queries.reshape(n, self._kv_heads, -1, self._head_dim)
            prefix = None
            if groups.segments:
                views = [self.cache.segment(index, s) for s in groups.segments]
                prefix = attend_prefixes(queries, groups, views, self._scale)
            attended = attend_rows(
                queries, row_keys, row_values, mask, self._scale, prefix, self._scratch
            )
            x = self._rest(layer, x, attended)
        x = self._norm(x, self._model.model.norm)
        head = self._model.lm_head
        return functional.linear(x, head.weight, head.bias).float()

    def _prefill(self, pieces: Seq[Piece]) -> None:
        device = self._cos.device
        ids = torch.tensor([t for p in pieces for t in p.tokens], device=device)
        positions = torch.cat(
            [torch.arange(p.start, p.start + len(p.tokens), device=device) for p in pieces]
        )
        rotation = self._cos[positions][:, None], self._sin[positions][:, None]
        x = functional.embedding(ids, self._model.model.embed_tokens.weight)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, x, rotation)
            attended, start = [], 0
            for piece in pieces:
                end = start + len(piece.tokens)
                piece_keys = keys[start:end].transpose(0, 1)
                piece_values = values[start:end].transpose(0, 1)
                write_piece(self.cache, index, piece, piece_keys, piece_values)
                if index < last:
                    piece_queries = queries[start:end].transpose(0, 1)
                    attended.append(
                        self._attend_piece(index, piece, piece_queries, piece_keys, piece_values)
                    )
                start = end
            # The last layer's output is not needed: logits come from the decode step.
            if index < last:
                x = self._rest(layer, x, torch.cat(attended))

    def _attend_piece(
        self, index: int, piece: Piece, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """`[Q, T, D]` over `[K, T, D]` and the piece's context; returns [T, Q*D]."""
        mask = None
        if piece.context is not None:
            past_keys, past_values = self.cache.segment(index, piece.context)
            past, new = past_keys.shape[1], keys.shape[1]
            keys = torch.cat([past_keys, keys], 1)
            values = torch.cat([past_values, values], 1)
            mask = torch.ones(new, past + new, dtype=torch.bool, device=keys.device).tril_(past)
        output = functional.scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=self._kv_heads != self._query_heads,
        )
        return output[0].transpose(0, 1).reshape(queries.shape[1], -1)

    def _project(
        self, layer: FusedLayer, x: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, Q, D], rotated keys and values [T, K, D]."""
        module = layer.module
        bias = layer.qkv_bias.whole if layer.qkv_bias is not None else None
        hidden = self._norm(x, module.input_layernorm)
        heads = functional.linear(hidden, layer.qkv.whole, bias)
        heads = heads.view(x.shape[0], -1, self._head_dim)
        split = self._query_heads + self._kv_heads
        rotated, values = heads[:, :split], heads[:, split:]
        if self._has_head_norm:
            attention = module.self_attn
            rotated = torch.cat(
                [
                    self._norm(rotated[:, : self._query_heads], attention.q_norm),
                    self._norm(rotated[:, self._query_heads :], attention.k_norm),
                ],
                1,
            )
        cos, sin = rotation
        rotated = torch.addcmul(rotated * cos, rotated.roll(self._head_dim // 2, -1), sin)
        return rotated[:, : self._query_heads], rotated[:, self._query_heads :], values

    def _rest(self, layer: FusedLayer, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward part, both with their residual."""
        module = layer.module
        output = module.self_attn.o_proj
        x = x + functional.linear(attended, output.weight, output.bias)
        bias = layer.gate_up_bias.whole if layer.gate_up_bias is not None else None
        hidden = self._norm(x, module.post_attention_layernorm)
        gate, up = functional.linear(hidden, layer.gate_up.whole, bias).chunk(2, -1)
        down = module.mlp.down_proj
        return x + functional.linear(functional.silu(gate).mul_(up), down.weight, down.bias)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), norm.weight, self._eps)

    def _rotation(self, positions: int) -> tuple[Tensor, Tensor]:
        """Tables [positions, D]; the sine carries the sign of the half that it multiplies."""
        weight = self._model.model.embed_tokens.weight
        places = torch.arange(positions, device=weight.device)[None]
        cos, sin = self._model.model.rotary_emb(weight[:1, None], places)
        half = self._head_dim // 2
        sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return cos[0].contiguous(), sin.contiguous()
