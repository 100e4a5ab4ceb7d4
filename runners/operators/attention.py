"""Attention whose projections are layers like any other, so that they can be quantized, sparsified and exported.

`nn.MultiheadAttention` keeps the weights of its projections as parameters of its own and hands them to one function,
past every hook and parametrization: a third of an encoder's weights would stay as they are. `open_attention` puts an
equivalent module in its place.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """What `nn.MultiheadAttention` computes (Vaswani et al. 2017), with a linear layer for each projection.

    Arguments and results are those of `nn.MultiheadAttention`. A head has the size that it was built with. Of
    queries, keys and values whole heads can be removed (`prune.prune_channels`), and `num_heads` says how many there
    are.
    """

    # torch's encoder layers look here to find out whether their fused path, which reads weights, may be taken.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.batch_first = source.num_heads, source.head_dim, source.batch_first
        self.dropout = nn.Dropout(source.dropout)
        if source._qkv_same_embed_dim:
            weights = source.in_proj_weight.detach().tensor_split(3)
        else:
            weights = tuple(w.detach() for w in (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight))
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.detach().tensor_split(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        out = source.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        single, turned = query.ndim == 2, query.ndim == 3 and not self.batch_first
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self._heads(self.q_proj(query)).transpose(1, 2)
        k = self._heads(self.k_proj(key)).permute(0, 2, 3, 1)
        v = self._heads(self.v_proj(value)).transpose(1, 2)
        scores = q @ k / math.sqrt(self.head_dim)
        if attn_mask is not None:  # [targets, sources], or one for each input and head
            mask = attn_mask if attn_mask.ndim == 2 else attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
            scores = _masked(scores, mask)
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[:, None, None, :])
        weights = scores.softmax(-1)
        mixed = (self.dropout(weights) @ v).transpose(1, 2)
        out = self.out_proj(mixed.reshape(-1, int(mixed.shape[1]), self.num_heads * self.head_dim))
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if single:
            return out.squeeze(0), None if shown is None else shown.squeeze(0)
        return out.transpose(0, 1) if turned else out, shown

    def _heads(self, x: Tensor) -> Tensor:
        """`[n, tokens, channels]` by heads. The number of tokens becomes a constant of the exported graph, whose inputs
        have one size but for the batch; computing it there takes some per cent of a small encoder's time."""
        return x.reshape(-1, int(x.shape[1]), self.num_heads, self.head_dim)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def open_attention(model: nn.Module) -> nn.Module:
    """A copy of the model with `Attention` in the place of every `nn.MultiheadAttention`; the model itself without any.

    Those with learned keys or zeros beside the input's stay as they are, and so do subclasses, which may compute
    something else.

        >>> model = open_attention(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][:4]
        ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.out_proj']
    """
    if not any(type(part) is nn.MultiheadAttention for part in model.modules()):
        return model
    model = copy.deepcopy(model)  # it is the caller's
    made: dict[nn.MultiheadAttention, Attention] = {}  # one that is used at two places stays one
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # it is for the fused path only
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention and child.bias_k is None and not child.add_zero_attn:
                made.setdefault(child, Attention(child).train(child.training))
                setattr(parent, name, made[child])
    return model
