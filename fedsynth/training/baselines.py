"""Task models that nothing is trained of: the majority, and the label of the nearest text or wording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsynth.corpus import Corpus
from fedsynth.models.embedding import Embedder, directions
from fedsynth.training.examples import readable

FURTHER = -2.0  # than any cosine: a label without a text


class Majority(nn.Module):
    """Every text gets the label that the learnt texts have most often; of equally many, the first of the list.

    Args:
        classes: Number of labels.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.chosen: Tensor
        self.register_buffer("chosen", torch.zeros(classes))

    def learn(self, corpus: Corpus, labels: Sequence[str], longest: int, seed: int | Sequence[int]) -> None:  # noqa: ARG002 - as `Nearest`
        """Counts labels; without a text of any, the first of the list is chosen."""
        counts = corpus.counts()
        self.chosen.zero_()[max(range(len(labels)), key=lambda place: counts[labels[place]])] = 1.0

    def logits(self, texts: Sequence[str], longest: int) -> Tensor:  # noqa: ARG002 - as `Nearest.logits`
        """1 for the label, shape (texts, classes)."""
        return self.chosen.expand(len(texts), -1)


class Nearest(nn.Module):
    """Every text gets the label of the learnt text that is nearest to it by cosine; of equally near ones, the label
    that comes first in the list.

    Args:
        embedder: Stays as it is.
        classes: Number of labels.
        shots: Learnt texts of a label, at most.
    """

    def __init__(self, embedder: Embedder, classes: int, shots: int):
        super().__init__()
        self.embedder, self.shots = embedder, shots  # no module: not trained, not saved
        self.vectors: Tensor
        self.there: Tensor
        self.register_buffer("vectors", torch.zeros(classes, shots, embedder.width))
        self.register_buffer("there", torch.zeros(classes, shots, dtype=torch.bool))

    def learn(self, corpus: Corpus, labels: Sequence[str], longest: int, seed: int | Sequence[int]) -> None:
        """Draws texts of each label and keeps their embeddings. Texts that the tokenizer cannot read are left out.

        Args:
            corpus: Texts and class names; one may be missing.
            labels: The public label list; a class's number is its place.
            longest: Longer texts are cut after so many tokens.
            seed: Public; of the draw.
        """
        rng = np.random.default_rng(seed)
        self.there.zero_()
        for place, label in enumerate(labels):
            rows = [row for row, answer in enumerate(corpus.answers) if answer == label]
            drawn = [corpus.prompts[row] for row in rng.permutation(rows).astype(int).tolist()]
            texts = [text for text in drawn if readable(self.embedder.tokenizer, text)][: self.shots]
            self.vectors[place, : len(texts)] = directions(self.embedder, tuple(texts), longest).to(self.vectors.device)
            self.there[place, : len(texts)] = True

    def logits(self, texts: Sequence[str], longest: int) -> Tensor:
        """Cosine of the nearest text of each label, shape (texts, classes)."""
        found = directions(self.embedder, tuple(texts), longest).to(self.vectors.device)
        cosines = torch.einsum("tw,csw->tcs", found, self.vectors)
        return cosines.masked_fill(~self.there, FURTHER).amax(dim=2)
