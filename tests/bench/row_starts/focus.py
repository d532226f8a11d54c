"""New rows as sums of the rows of tokens with similar neighbours in text (FOCUS-like).

Source: Dobler and de Melo 2023, arXiv 2305.14481: a token that only the new tokenizer has gets a mean of the rows of
tokens that both have, weighted by the sparsemax of the cosines between auxiliary vectors of the new tokens. There the
vectors are fastText's, trained on text in the new tokenizer; here they are the truncated singular vectors of the
positive pointwise mutual information of tokens within two places of each other (Levy and Goldberg 2014), from the
recipe's corpus. A token that is not in that text gets the mean of its pieces' rows.

Shape legend: V tokens of the new vocabulary, S of them shared, N made, K vector width.
"""

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import svds
from torch import Tensor

from pipeline.corpus.documents import Corpus
from stage2_student.model.row_starts import IN_PIECES, Move, NewRows
from stage2_student.model.row_starts.pieces import mean

WIDTH = 300  # fastText's default
WINDOW = 2
_AT_ONCE = 512


def make_rows(move: Move, weight_OD: Tensor) -> NewRows:
    rows_VD = mean(move, weight_OD).rows_VD
    vectors_VK, is_met_V = token_vectors(_encoded(move), len(move.sources))
    kinds = np.array(move.kinds)
    made = np.flatnonzero(np.isin(kinds, IN_PIECES) & is_met_V)
    shared = np.flatnonzero((kinds == "copied") & is_met_V)
    for first in range(0, len(made), _AT_ONCE):
        some = made[first : first + _AT_ONCE]
        shares_NS = sparsemax(torch.from_numpy(vectors_VK[some] @ vectors_VK[shared].T))
        rows_VD[some] = shares_NS @ rows_VD[shared]
    return NewRows(rows_VD, facts={"focus_rows": len(made)})


def token_vectors(documents: list[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors of tokens from the text around them (V, K; zero for none), and which the text has."""
    rows, columns = [], []
    for tokens in documents:
        for away in range(1, WINDOW + 1):
            rows += [tokens[:-away], tokens[away:]]
            columns += [tokens[away:], tokens[:-away]]
    pairs = (np.concatenate(rows), np.concatenate(columns))
    counts = coo_matrix((np.ones(len(pairs[0])), pairs), shape=(num_tokens, num_tokens)).tocsr().tocoo()
    sums_V = np.asarray(counts.sum(1)).ravel()
    information = np.log(counts.data * sums_V.sum() / (sums_V[counts.row] * sums_V[counts.col]))
    counts.data = np.maximum(information, 0.0)
    width = min(WIDTH, int((sums_V > 0).sum()) - 1)
    left, values, _ = svds(counts.tocsr(), k=width, random_state=0)
    vectors_VK = (left * np.sqrt(values)).astype(np.float32)
    norms_V1 = np.linalg.norm(vectors_VK, axis=1, keepdims=True)
    return vectors_VK / np.maximum(norms_V1, 1e-12), norms_V1[:, 0] > 1e-6


def sparsemax(scores_NS: Tensor) -> Tensor:
    """Project each row onto the simplex (Martins and Astudillo 2016, arXiv 1602.02068)."""
    sorted_NS = scores_NS.sort(dim=1, descending=True).values
    counts_S = torch.arange(1, scores_NS.shape[1] + 1)
    sums_NS = sorted_NS.cumsum(1)
    is_in_NS = 1 + counts_S * sorted_NS > sums_NS
    size_N1 = is_in_NS.sum(1, keepdim=True)
    threshold_N1 = (sums_NS.gather(1, size_N1 - 1) - 1) / size_N1
    return (scores_NS - threshold_N1).clamp(min=0)


def _encoded(move: Move) -> list[np.ndarray]:
    texts = [text for document in Corpus(move.recipe.corpus).documents() for text in document.texts]
    encoded = move.new.encode_batch([text if isinstance(text, bytes) else text.encode() for text in texts])
    return [np.array(tokens) for tokens in encoded if not isinstance(tokens, ValueError)]
