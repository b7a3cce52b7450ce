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
from titanmem.precision import quick_products
from titanmem.stream import EITHER, REPLY, STATEMENT, UNLIKELY, WRITTEN, Batch

SCORES_MAX = 2**26
"""Scores of (place, token of the vocabulary) in a step, at most, some times over."""


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
    temperature: float = 20.0
    """Scale of similarities in the contrastive loss."""
    share: float = 2.0
    share_temperature: float = 8.0
    """The own key shall not only be nearest. A read is a sum over all keys, each by how much its code shares with the
    query's, and that grows by e^4 per unit of cosine only (by e^8 where others' values point anywhere, so that squares
    add up): keys that are far enough apart for `temperature` give an answer that is mostly of other facts."""
    nothing: float = 0.5
    """Similarity under which nothing is found: a query for what nobody told must stay below it with every key."""
    twins: float = 1.0
    """Keys of one fact told twice lie together, and apart from all others': a correction in other words is then written
    over what it corrects, and facts that only resemble each other are not."""
    first: float = 2.0
    """Weight of a value's first token beside the others: it is found by what question and statement mean, and they by
    what stands before them."""
    shape_below: bool = True
    """Whether replies shape the lower layers too. Where a teacher has, keys and queries alone may move them."""
    negatives: float = 4.0
    """Weight of book and small talk that must not be written: there are thousands of tokens for each that must."""
    told: float = 8.0
    """Weight of tokens of a value. One that is not written costs the fact; a word beside it that is written costs a
    little room. With equal weights, eight of ten missed needles were missed by the gate (docs/log.md)."""


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


def weighted(x_N: Tensor, weight_N: Tensor) -> Tensor:
    """The weighted mean, and 0 for nothing."""
    return (x_N * weight_N).sum() / weight_N.sum().clamp_min(1e-6)


def overlap(code_QH: Tensor, group_Q: Tensor, other_NH: Tensor, group_N: Tensor) -> Tensor:
    """How much two lists of codes share, [Q, N]; nothing with another group's.

    In float32: each step has other numbers of rows, and for every new shape oneDNN makes another bfloat16 kernel, which
    takes twenty times as long as this product (docs/log.md).
    """
    return (code_QH @ other_NH.T) * (group_Q[:, None] == group_N[None])


def memory_of(decoder: Decoder, white_NF: Tensor, values_ND: Tensor, weight_N: Tensor, group_N: Tensor):
    """Codes of the written tokens [N, H] and their weighted errors w e [N, D], each group a memory of its own."""
    code_NH = dense(*decoder.memory.code_of(white_NF), decoder.config.memory.code_width)
    error_ND = delta_errors(overlap(code_NH, group_N, code_NH, group_N), values_ND, weight_N)
    return code_NH, weight_N[:, None] * error_ND


def step_loss(
    decoder: Decoder,
    batch: Batch,
    weights: Weights,
    generator: torch.Generator,
    mode: str = "mac",
) -> Result:
    """Losses of one batch in one mode."""
    memory = decoder.memory
    tokens = torch.from_numpy(batch.tokens).long()
    inputs, target = tokens[:, :-1].contiguous(), tokens[:, 1:]
    rows, length = inputs.shape
    part, gate_label = torch.from_numpy(batch.part)[:, 1:], torch.from_numpy(batch.gate)[:, :-1]
    group = torch.from_numpy(batch.group).repeat_interleave(length)
    identity = torch.from_numpy(batch.identity)
    recall, nothing = torch.from_numpy(batch.recall)[:, 1:], torch.from_numpy(batch.nothing)[:, 1:]
    spoken = (torch.arange(rows) < batch.spoken)[:, None]

    with quick_products():
        x, hidden = decoder.lower_blocks(inputs)
        around = memory.lookahead(hidden).float()
        history = decoder.zeros(rows, decoder.config.memory.history)
        behind = memory.behind(hidden, history)
    x = x if weights.shape_below else x.detach()
    hidden = hidden.float()
    key = memory.keys(hidden, around).flatten(0, 1)
    behind = None if behind is None else behind.float()
    query = memory.queries(hidden, history, behind).flatten(0, 1)
    gate = memory.gate_logit(around)
    values_VD = memory.vocabulary_values(decoder.embed_tokens.weight)

    # Written: every labelled value, and the tokens that the gate would let in by mistake.
    labelled = gate_label == WRITTEN
    mistaken = ~labelled & (gate_label != EITHER) & (gate.detach() > -2.0)
    written = torch.cat([chosen(labelled, 768, generator), chosen(mistaken, 64, generator)]).sort().values
    weight_N = torch.where(labelled.flatten()[written], 1.0, torch.sigmoid(gate.detach().flatten()[written]))
    stored_NF = memory.whitened(key[written])
    code_NH, error_ND = memory_of(
        decoder, stored_NF.detach(), values_VD[inputs.flatten()[written]], weight_N, group[written]
    )

    # Reading, in spoken rows: replies, and some of all else but statements, which would find themselves.
    others = (torch.rand(part.shape, generator=generator) < 0.04) & (part != STATEMENT)
    # A vocabulary of 150,000 is scored at fewer places, so that a step needs no more than some hundred MB.
    most = min(640, SCORES_MAX // len(values_VD))
    reading = chosen(spoken & ((part == REPLY) | others | recall), most, generator)
    query_QF = memory.whitened(query[reading])
    query_QH = dense(*memory.code_of(query_QF.detach()), decoder.config.memory.code_width)
    read_QD = overlap(query_QH, group[reading], code_NH, group[written]) @ error_ND
    read = torch.zeros(rows * length, read_QD.shape[1]).index_copy(0, reading, read_QD)

    shown = batch.spoken * length
    with quick_products():
        said = read[:shown].view(batch.spoken, length, -1)
        out = decoder.upper_blocks(x[: batch.spoken], said, mode).flatten(0, 1).float()
    heard = torch.rand(part.shape, generator=generator) < 0.2
    places = chosen(spoken & (heard | (part == REPLY) | recall), 2 * most + 256, generator)
    with quick_products():
        logits = decoder.lm_head(out[places]).float()
    logits = logits + memory.pointer_logits(out[places], read[places], values_VD)
    entropy = F.cross_entropy(logits, target.flatten()[places], reduction="none")
    remembered = recall.flatten()[places]
    if decoder.lm_head.weight.requires_grad:
        language = mean(entropy[~remembered])
    else:  # a frozen decoder knows its language: where it is not to recall, it shall speak as it does alone
        aside = places[~remembered]
        with torch.no_grad(), quick_products():
            silent = torch.zeros(batch.spoken, length, read.shape[1])
            alone = decoder.lm_head(
                decoder.upper_blocks(x[: batch.spoken], silent, mode).flatten(0, 1)[aside]
            )
        language = F.kl_div(
            logits[~remembered].log_softmax(-1),
            alone.float().log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )

    known = recall.flatten()[reading]
    # What is read has norm 1 when the fact is found; a small answer stays small, or its direction would be noise.
    pointed = 16.0 * read_QD[known] / read_QD[known].norm(dim=-1, keepdim=True).clamp_min(0.5) @ values_VD.T
    sought = target.flatten()[reading][known]

    # Asking, in all rows: what is to be found, and what is not.
    asking = chosen(recall | nothing, 640, generator)
    unit_NF = F.normalize(stored_NF, dim=-1)
    identity_N = identity[:, :-1].flatten()[written]
    begins = recall & ~F.pad(recall, (1, -1))
    contrast, share, align, found, refused = _contrast(
        F.normalize(memory.whitened(query[asking]), dim=-1) @ unit_NF.T,
        identity[:, 1:].flatten()[asking][:, None] == identity_N[None],
        recall.flatten()[asking],
        nothing.flatten()[asking],
        group[asking][:, None] == group[written][None],
        torch.where(begins, weights.first, 1.0).flatten()[asking],
        weights,
    )
    twins, twins_found = _twins(unit_NF, identity_N, weights)
    trained = gate_label != EITHER
    gate_weight = torch.where(gate_label == UNLIKELY, 1.0, weights.negatives)
    gate_weight = torch.where(labelled, weights.told, gate_weight)[trained]

    losses = {
        "language": language,
        "recall": mean(entropy[remembered]),
        "memory": mean(F.cross_entropy(pointed, sought, reduction="none")),
        "contrast": contrast,
        "share": share,
        "align": align,
        "twins": twins,
        "gate": F.binary_cross_entropy_with_logits(
            gate[trained], labelled[trained].float(), weight=gate_weight
        ),
    }
    total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
    with torch.no_grad():
        figures = {name: float(loss) for name, loss in losses.items()}
        right = logits.argmax(-1) == target.flatten()[places]
        spoke = (part == REPLY).flatten()[places] & ~remembered
        refusing = nothing.flatten()[places]
        figures["recall_accuracy"] = float(mean(right[remembered].float()))
        figures["refusal_accuracy"] = float(mean(right[refusing].float()))
        figures["reply_accuracy"] = float(mean(right[spoke].float()))
        figures["memory_accuracy"] = float(mean((pointed.argmax(-1) == sought).float()))
        figures["found"], figures["refused"], figures["twins_found"] = found, refused, twins_found
        figures["written_found"] = float(mean((gate[labelled] > -1.7).float()))
        figures["written_wrongly"] = float((gate[gate_label == 0] > -1.7).float().mean())
        features_NF = memory.features(key[chosen(labelled, 512, generator)])
    return Result(loss=total, figures=figures, written_features_NF=features_NF)


def _twins(unit_NF: Tensor, identity_N: Tensor, weights: Weights) -> tuple[Tensor, float]:
    """`Weights.twins`: each key of a fact told twice against all keys but itself; the share that find their twin."""
    oneself_NN = torch.eye(len(identity_N), dtype=torch.bool)
    told_N = identity_N != 0
    contrast, _, align, found, _ = _contrast(
        (unit_NF @ unit_NF.T).masked_fill(oneself_NN, -10.0),
        (identity_N[:, None] == identity_N[None]) & ~oneself_NN & told_N,
        told_N,
        torch.zeros_like(told_N),
        ~oneself_NN,
        torch.ones(len(identity_N)),
        weights,
    )
    return contrast + weights.align * align, found


def _contrast(
    cosine_QN: Tensor,
    same_QN: Tensor,
    known_Q: Tensor,
    nothing_Q: Tensor,
    own_QN: Tensor,
    weight_Q: Tensor,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """InfoNCE (arXiv 1807.03748) with a class for nothing: a query is nearer to its own fact's key than to any other
    and than `weights.nothing`, and one for what was never told is near to no key of its user.

    Also what is missing of the own fact's share in a read (`Weights.share_temperature`), the mean distance 1 - cosine
    to the own key, and the shares of queries that find it, and that find nothing. Means of losses are by `weight_Q`.
    """
    known_Q = known_Q & same_QN.any(1)
    cosine_KN, same_KN = cosine_QN[known_Q], same_QN[known_Q]
    nobody = cosine_KN.new_full((len(cosine_KN), 1), weights.nothing)
    logits = weights.temperature * torch.cat([cosine_KN, nobody], 1)
    # One column more: a short batch may tell nothing, and there must be something to take the largest of.
    own_KN = F.pad(cosine_KN.masked_fill(~same_KN, -10.0), (0, 1), value=-10.0)
    positive = torch.logsumexp(weights.temperature * own_KN, 1)
    soft = weights.share_temperature
    share_K = torch.logsumexp(soft * cosine_KN, 1) - torch.logsumexp(soft * own_KN, 1)
    distance_K = 1 - (cosine_KN * same_KN).sum(1) / same_KN.sum(1).clamp_min(1)
    found_K = own_KN.amax(1) >= logits.amax(1) / weights.temperature - 1e-6
    far_MN = cosine_QN[nothing_Q].masked_fill(~own_QN[nothing_Q], -10.0)
    nobody = far_MN.new_full((len(far_MN), 1), weights.nothing)
    refusing = weights.temperature * torch.cat([far_MN, nobody], 1)
    loss_K = torch.logsumexp(logits, 1) - positive
    loss_M = torch.logsumexp(refusing, 1) - refusing[:, -1]
    refused_M = (far_MN < weights.nothing).all(1)
    weight_K, weight_M = weight_Q[known_Q], weight_Q[nothing_Q]
    return (
        weighted(torch.cat([loss_K, loss_M]), torch.cat([weight_K, weight_M])),
        weighted(share_K, weight_K),
        weighted(distance_K, weight_K),
        float(mean(found_K.float())),
        float(mean(refused_M.float())),
    )
