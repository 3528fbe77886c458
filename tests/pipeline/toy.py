"""A toy chunk with the pipeline's calling convention, and the same model in one process."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, SEQ = 11, 8, 5


class ToyChunk(nn.Module):
    """Embedding (first chunk), residual MLP layers, head and loss (last chunk); a chunk lacks what others hold."""

    def __init__(self, layers: range, first: bool, last: bool, embedding: nn.Embedding | None = None):
        super().__init__()
        self.embedding = embedding or (nn.Embedding(VOCAB, HIDDEN) if first else None)
        self.first = first
        self.layers = nn.ModuleDict({str(i): ToyLayer() for i in layers})
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False) if last else None

    def forward(self, x: Tensor, *, tokens_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        if self.first:
            x = self.embedding(x[:, :-1])
        for layer in self.layers.values():
            x = layer(x)
        if self.head is None:
            return x
        if self.embedding is not None and not self.first:  # as the MTP module uses the embedding again
            x = x + self.embedding(tokens_BS[:, 1:])
        loss = F.cross_entropy(self.head(x).flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="none")
        if documents_BS is not None:
            loss = loss * documents_BS[:, 1:].flatten()
        return loss.mean().reshape(1)


class ToyLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 12), nn.Linear(12, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def whole_model(layers: int, tied: bool = False) -> list[ToyChunk]:
    """The model as two chunks that one process runs in turn; tied: the last uses the first's embedding too."""
    torch.manual_seed(3)
    first = ToyChunk(range(layers - 1), first=True, last=False)
    return [first, ToyChunk(range(layers - 1, layers), False, True, first.embedding if tied else None)]


def take(whole: list[ToyChunk], layers: list[range], stage_ids: list[int]) -> list[ToyChunk]:
    """Copies of the parts of the whole model that these stages hold; a tied embedding is shared on this rank."""
    source = copy.deepcopy(whole)
    modules = {k: v for chunk in source for k, v in chunk.layers.items()}
    chunks = []
    for stage in stage_ids:
        last = stage == len(layers) - 1
        chunk = ToyChunk(range(0), first=stage == 0, last=last)
        chunk.layers = nn.ModuleDict({str(i): modules[str(i)] for i in layers[stage]})
        if stage == 0:
            chunk.embedding = source[0].embedding
        if last:
            chunk.head, chunk.embedding = source[1].head, chunk.embedding or source[1].embedding
        chunks.append(chunk)
    return chunks


def reference(whole: list[ToyChunk], tokens_BS: Tensor, documents_BS: Tensor | None, micro_batches: int) -> Tensor:
    """Mean loss and gradients in one process, micro-batch after micro-batch."""
    total = torch.zeros(())
    documents = [None] * micro_batches if documents_BS is None else documents_BS.chunk(micro_batches)
    for tokens, document in zip(tokens_BS.chunk(micro_batches), documents, strict=True):
        x = whole[0](tokens, tokens_BS=tokens)
        loss = whole[1](x, tokens_BS=tokens, documents_BS=document).sum() / micro_batches
        loss.backward()
        total += loss.detach()
    return total


def gradients(chunks: list[ToyChunk]) -> dict[str, Tensor]:
    """Gradient of every parameter under its global name."""
    named = {name: p.grad for chunk in chunks for name, p in chunk.named_parameters()}
    return {name: grad.clone() for name, grad in named.items() if grad is not None}
