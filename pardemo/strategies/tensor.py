"""Tensor parallelism: every pair of Linear layers cut over ranks, columns then rows.

Split      in attention the heads, in a feed-forward the hidden features; with `sequence_parallel`
           also norms and residuals, by tokens; with `loss_parallel` the head, by vocabulary.
           Embedding, norms and head are whole on every rank otherwise; `Step.notes` names what is.
Sent       per transformer layer 4 all-reduces of the activation A = batch x sequence x hidden x b
           bytes: after the rows of attention and feed-forward, and in backward before their
           columns; 2(t-1)/t A each. A model's first pair has no backward one when its input needs
           no gradient; attention to another sequence has two backward, one for each of its inputs;
           what returns its weights also sums these. sequence_parallel: 4 all-gathers and 4
           reduce-scatters of A instead, each (t-1)/t A (gloo scatters by reducing everything:
           2(t-1)/t A), one all-gather before the head, one in backward after the embedding, an
           all-reduce of each norm's gradient.
           loss_parallel: three all-reduces of one number per token, one of A before the head, in
           backward; and one of A after the embedding in forward when the two are tied.
Memory     1/t of the layers that are cut: parameters, gradients, optimiser state, hidden
           activations; everything else whole.
Papers     Shoeybi 2019 (Megatron-LM); Korthikanti 2022 (sequence parallel).

The plan is found in the model itself: attention with wq, wk, wv, wo; nn.MultiheadAttention and
torch's transformer layers (tensor_attention.py); any Linear, elementwise functions, Linear that
torch.fx can see.
"""

from __future__ import annotations

from pardemo.strategies import base
from pardemo.strategies.tensor_build import KNOBS, build, reasons_against

STRATEGY = base.Strategy(
    name="tensor",
    title="tensor parallel",
    axes=("tp",),
    build=build,
    reasons_against=reasons_against,
    knobs=KNOBS,
    lesson="07_tensor_parallelism",
)
