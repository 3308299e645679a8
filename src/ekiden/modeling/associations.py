"""Rows of an embedding that lie near one another where their tokens stand in the same surroundings.

From the co-occurrences of `tokens.cooccurrence` to the embedding that `modeling.build` begins with, for a tied model
both what a token looks like and what it is predicted by.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

Associations = tuple[np.ndarray, np.ndarray, np.ndarray]
"""first, second: int64 [n], two tokens, each pair once, first <= second. strength: float32 [n], above 0: how strongly they
belong together (`tokens.cooccurrence`: their pointwise mutual information, in nats)."""

RANK = 256
"""Directions looked for at most; a wider embedding holds them in random ones of its own."""
EXTRA = 30
"""Random directions beyond those that are kept (Halko, Martinsson & Tropp 2011, arXiv:0909.4061)."""
ITERATIONS = 4
"""Times the directions are multiplied by the matrix before they are taken."""


@torch.no_grad()
def embedding_rows(
    associations: Associations, vocab_size: int, units: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row of length 1 for every token, float32 [vocab_size, units], and which tokens have one, bool [vocab_size].

    The largest eigenvectors of the matrix of associations, each times the square root of its eigenvalue (Levy & Goldberg 2014,
    "Neural word embedding as implicit matrix factorization"), turned at random so that no unit is another's better. A
    token that is near none is left at 0. One thread: the bits do not depend on how many there are.
    """
    tokens, places = np.unique(np.concatenate(associations[:2]), return_inverse=True)
    if 2 * len(tokens) < vocab_size:  # time and memory grow with the matrix
        first, second = np.split(places, 2)
        found, found_known = embedding_rows((first, second, associations[2]), len(tokens), units, seed)
        rows, known = torch.zeros(vocab_size, units), torch.zeros(vocab_size, dtype=torch.bool)
        rows[tokens], known[tokens] = found, found_known
        return rows, known
    count = min(units, RANK, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = _symmetric(associations, vocab_size)
        basis = torch.randn(vocab_size, min(count + EXTRA, vocab_size), generator=generator)
        basis = torch.linalg.qr(basis)[0]
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(torch.sparse.mm(matrix, basis))[0]
        values, vectors = torch.linalg.eigh(basis.T @ torch.sparse.mm(matrix, basis))
        values, vectors = values.flip(0)[:count].clamp_min(0.0), vectors.flip(1)[:, :count]
        turn = torch.linalg.qr(torch.randn(units, count, generator=generator))[0].T
        rows = (basis @ (vectors * values.sqrt())) @ turn
    finally:
        torch.set_num_threads(threads)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    known = length.squeeze(1) > 1e-3
    return torch.where(known[:, None], rows / length.clamp_min(1e-12), 0.0), known


def _symmetric(associations: Associations, vocab_size: int) -> torch.Tensor:
    """Return the associations as a sparse matrix [vocab_size, vocab_size] that holds each pair both ways."""
    first, second, strength = (torch.from_numpy(array) for array in associations)
    other = first != second
    places = torch.stack([torch.cat([first, second[other]]), torch.cat([second, first[other]])])
    values = torch.cat([strength, strength[other]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "beta state", "invariant checks": said once a process
        return torch.sparse_coo_tensor(
            places, values, (vocab_size, vocab_size), check_invariants=True
        ).to_sparse_csr()
