"""What the memory is meta-trained for: one batch, its memory and its losses.

The memory of a batch is built in closed form: with codes A of what is written, the token-by-token delta rule is one
triangular solve over A A^T (`kernels.sparse.delta_errors`), and a read is A_q A^T (w e). No state is carried from
batch to batch, so that features may change as fast as they like while nothing stored goes stale. What a read returns
trains the decoder and the values; which key a query finds is trained by a contrastive loss.

Axes: B rows, T tokens, N written tokens, Q reading tokens, H code width, D value width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.sparse import delta_errors
from titanmem.decoder import Decoder
from titanmem.stream import EITHER, REPLY, STATEMENT, WRITTEN, Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights of the losses."""

    language: float = 0.6
    recall: float = 1.0
    memory: float = 1.0
    contrast: float = 1.0
    align: float = 2.0
    """Pull of a query towards its own key. Being nearest is not enough: two directions at cosine 0.74 share so few
    of 8,192 units that the code finds 0.3 of what was stored; at 0.95 it finds most of it."""
    gate: float = 3.0
    temperature: float = 16.0
    """Scale of similarities in the contrastive loss."""
    negatives: float = 4.0
    """Weight of tokens that must not be written: there are thousands for each that must."""


@dataclass(slots=True)
class Result:
    """Loss with gradient, and plain figures for the report."""

    loss: Tensor
    figures: dict[str, float]
    written_features_NF: Tensor
    """Features of written keys, for the whitening."""


def dense(columns_NK: Tensor, values_NK: Tensor, width: int) -> Tensor:
    """Sparse codes as rows of a dense matrix [N, H]."""
    return torch.zeros(len(values_NK), width, device=values_NK.device).scatter(1, columns_NK, values_NK)


def chosen(mask_BT: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Flat indices of at most `most` true places, in order."""
    index = mask_BT.flatten().nonzero()[:, 0]
    if len(index) > most:
        index = index[torch.randperm(len(index), generator=generator)[:most].sort().values]
    return index


def mean(x_N: Tensor) -> Tensor:
    """The mean, and 0 for nothing: a short batch may ask for no fact at all."""
    return x_N.sum() / max(1, len(x_N))


def memory_of(decoder: Decoder, white_NF: Tensor, values_ND: Tensor, weight_N: Tensor, group_N: Tensor):
    """Codes of the written tokens [N, H] and their weighted errors w e [N, D], each group a memory of its own."""
    code_NH = dense(*decoder.memory.code_of(white_NF), decoder.config.memory.code_width)
    overlap_NN = (code_NH @ code_NH.T) * (group_N[:, None] == group_N[None])
    error_ND = delta_errors(overlap_NN, values_ND, weight_N)
    return code_NH, weight_N[:, None] * error_ND


def step_loss(
    decoder: Decoder, batch: Batch, weights: Weights, generator: torch.Generator, lower=None, upper=None
) -> Result:
    """Losses of one batch; `lower` and `upper` may be compiled twins of the decoder's block methods."""
    memory = decoder.memory
    tokens = torch.from_numpy(batch.tokens).long()
    inputs, target = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    rows, length = inputs.shape
    part, gate_label = torch.from_numpy(batch.part), torch.from_numpy(batch.gate)[:, :-1]
    group = torch.from_numpy(batch.group).repeat_interleave(length)
    identity = torch.from_numpy(batch.identity)
    recall = torch.from_numpy(batch.recall)[:, 1:].flatten()

    x, hidden = (lower or decoder.lower_blocks)(inputs)
    key, query = memory.keys_queries(hidden, decoder.zeros(rows, decoder.config.memory.conv))
    key, query = key.flatten(0, 1), query.flatten(0, 1)
    gate = memory.gate_logit(hidden)
    values_VD = memory.vocabulary_values(decoder.embed_tokens.weight)

    # Written: every labelled value, and the tokens that the gate would let in by mistake.
    labelled = gate_label == WRITTEN
    mistaken = ~labelled & (gate_label != EITHER) & (gate.detach() > -2.0)
    written = torch.cat([chosen(labelled, 512, generator), chosen(mistaken, 64, generator)]).sort().values
    weight_N = torch.where(labelled.flatten()[written], 1.0, torch.sigmoid(gate.detach().flatten()[written]))
    stored_NF = memory.whitened(key[written])
    code_NH, error_ND = memory_of(
        decoder, stored_NF.detach(), values_VD[inputs.flatten()[written]], weight_N, group[written]
    )

    # Reading: replies, and some of everything else but statements, which would find themselves.
    replies = part[:, 1:] == REPLY
    others = (torch.rand(part[:, 1:].shape, generator=generator) < 0.04) & (part[:, 1:] != STATEMENT)
    reading = chosen(replies | others, 1024, generator)
    query_QF = memory.whitened(query[reading])
    query_QH = dense(*memory.code_of(query_QF.detach()), decoder.config.memory.code_width)
    read_QD = ((query_QH @ code_NH.T) * (group[reading][:, None] == group[written][None])) @ error_ND
    read = torch.zeros(rows * length, read_QD.shape[1]).index_copy(0, reading, read_QD)

    out = (upper or decoder.upper_blocks)(x, read.view(rows, length, -1)).flatten(0, 1)
    predicted = (torch.rand(rows * length, generator=generator) < 0.2) | replies.flatten() | recall
    places = chosen(predicted, 2048, generator)
    logits = decoder.logits(out[places], read[places], values_VD)
    entropy = F.cross_entropy(logits, target[places], reduction="none")
    remembered = recall[places]

    asked = recall[reading]
    # What is read has norm 1 when the fact is found; a small answer stays small, or its direction would be noise.
    pointed = 16.0 * read_QD[asked] / read_QD[asked].norm(dim=-1, keepdim=True).clamp_min(0.5) @ values_VD.T
    same = identity[:, 1:].flatten()[reading][asked][:, None] == identity[:, :-1].flatten()[written][None]
    # Keys and queries learn from the contrast alone, on whitened features before the code: two codes that share no
    # unit have no gradient that would bring them nearer, and those that do have a gradient of mostly noise.
    cosine_QN = F.normalize(query_QF[asked], dim=-1) @ F.normalize(stored_NF, dim=-1).T
    other_user = group[reading][asked][:, None] != group[written][None]
    contrast, align, aligned = _contrast(cosine_QN.masked_fill(other_user, -1e4), same, weights.temperature)
    known = gate_label != EITHER
    gate_weight = torch.where(labelled, 1.0, weights.negatives)[known]
    gate_loss = F.binary_cross_entropy_with_logits(gate[known], labelled[known].float(), weight=gate_weight)

    losses = {
        "language": mean(entropy[~remembered]),
        "recall": mean(entropy[remembered]),
        "memory": mean(F.cross_entropy(pointed, target[reading][asked], reduction="none")),
        "contrast": contrast,
        "align": align,
        "gate": gate_loss,
    }
    total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
    with torch.no_grad():
        figures = {name: float(loss) for name, loss in losses.items()}
        right = logits.argmax(-1) == target[places]
        spoken = replies.flatten()[places] & ~remembered
        figures["recall_accuracy"] = float(mean(right[remembered].float()))
        figures["reply_accuracy"] = float(mean(right[spoken].float()))
        figures["memory_accuracy"] = float(mean((pointed.argmax(-1) == target[reading][asked]).float()))
        figures["aligned"] = aligned
        figures["written_found"] = float(mean((gate[labelled] > -1.7).float()))
        figures["written_wrongly"] = float((gate[(gate_label == 0)] > -1.7).float().mean())
        features_NF = memory.features(key[chosen(labelled, 512, generator)])
    return Result(loss=total, figures=figures, written_features_NF=features_NF)


def _contrast(cosine_QN: Tensor, same_QN: Tensor, temperature: float) -> tuple[Tensor, Tensor, float]:
    """InfoNCE (a recalling query is nearer to its own fact's key than to any other, arXiv 1807.03748), the mean
    distance 1 - cosine to that key, and the share of queries for which it is the nearest."""
    hit = same_QN.any(1)
    if not bool(hit.any()):
        nothing = cosine_QN.sum() * 0.0
        return nothing, nothing, 0.0
    cosine_QN, same_QN = cosine_QN[hit], same_QN[hit]
    logits_QN = temperature * cosine_QN
    positive = torch.logsumexp(logits_QN.masked_fill(~same_QN, -1e4), 1)
    distance = 1 - (cosine_QN * same_QN).sum(1) / same_QN.sum(1)
    nearest = same_QN.gather(1, logits_QN.argmax(1, keepdim=True)).float().mean()
    return (torch.logsumexp(logits_QN, 1) - positive).mean(), distance.mean(), float(nearest.detach())
