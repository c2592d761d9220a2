"""Hash n-grams against the golden values of the released models and a big-integer twin; look-ups against plain ones."""

import pytest
import torch

from blt_titan.byte_vocab import BOS_ID, BYTE_OFFSET
from blt_titan.model.hash_embedding import HASH_PRIMES, HashEmbedding, ngram_hashes

SUM_ATOL = 1e-6
"""fp32 sums of up to 24 unit-scale look-ups in another order."""

HELLO = torch.tensor([[BOS_ID] + [byte + BYTE_OFFSET for byte in b"Hello, world"]])
GOLDEN = {
    3: [443987, 124875, 393970, 386145, 358223, 190185, 141703, 484917, 141967, 146186, 10172, 334275, 306354],
    8: [172383, 205585, 456240, 129346, 299568, 322649, 430431, 246559, 94549, 155186, 258407, 498251, 491201],
}


def wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def serial_hashes(ids: list[int], docs: list[int], n: int, prime: int, n_rows: int) -> list[int]:
    """Hash each window from the definition, with Python's unbounded integers, wrapped once at the end."""
    rows = []
    for end in range(len(ids)):
        window = [ids[i] if i >= 0 and docs[i] == docs[end] else 0 for i in range(end - n + 1, end + 1)]
        rows.append(wrap_int64(sum(w * prime**j for j, w in enumerate(window))) % n_rows)
    return rows


def random_rows(seed: int = 0):
    """Rows of several documents with padding; among them one of many short documents."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(0, 260, (3, 40), generator=generator, dtype=torch.int32)
    doc_BS = torch.stack(
        [torch.zeros(40), torch.arange(40) // 3, torch.cat([torch.zeros(11), torch.ones(20), -torch.ones(9)])]
    ).int()
    return ids_BS, doc_BS


@pytest.mark.parametrize("n", [3, 8])
def test_golden_hashes(n):
    hashes = ngram_hashes(HELLO, torch.zeros_like(HELLO), ngrams=[n], n_functions=1, n_rows=500_002)
    assert hashes[0, :, 0].tolist() == GOLDEN[n]


@pytest.mark.parametrize("n_rows", [997, 500_002])
def test_every_prime_and_length_equals_the_definition(n_rows):
    ids_BS, doc_BS = random_rows()
    ngrams = range(1, 9)
    hashes = ngram_hashes(ids_BS, doc_BS, ngrams=ngrams, n_functions=len(HASH_PRIMES), n_rows=n_rows)
    assert hashes.shape == (*ids_BS.shape, len(HASH_PRIMES) * len(ngrams))
    for row in range(len(ids_BS)):
        ids, docs = ids_BS[row].tolist(), doc_BS[row].tolist()
        table = 0
        for prime in HASH_PRIMES:
            for n in ngrams:
                assert hashes[row, :, table].tolist() == serial_hashes(ids, docs, n, prime, n_rows), (prime, n)
                table += 1


def test_negative_wraparound_occurs_and_rows_stay_in_their_table():
    """The definition's sums do leave int64 and turn negative here, so that floor modulo is what keeps rows >= 0."""
    ids_BS, doc_BS = random_rows()
    ids = ids_BS[0].tolist()
    sums = [sum(w * HASH_PRIMES[0] ** j for j, w in enumerate(ids[i : i + 8])) for i in range(30)]
    assert any(wrap_int64(total) < 0 for total in sums)
    hashes = ngram_hashes(ids_BS, doc_BS, ngrams=[3, 8], n_functions=4, n_rows=101)
    assert hashes.min() >= 0
    assert hashes.max() < 101


def test_window_restarts_at_each_document():
    first, second = HELLO[:, :7], HELLO
    together = torch.cat([first, second], dim=1)
    doc_BS = torch.tensor([[0] * 7 + [1] * 13])
    options = dict(ngrams=(1, 3, 8), n_functions=2, n_rows=500_002)
    hashes = ngram_hashes(together, doc_BS, **options)
    alone = ngram_hashes(second, torch.zeros_like(second), **options)
    assert torch.equal(hashes[:, 7:], alone)
    running_on = ngram_hashes(together, torch.zeros_like(doc_BS), **options)
    assert not torch.equal(running_on[:, 7:], alone)


def test_ngrams_longer_than_the_row():
    ids_BS = HELLO[:, :2]
    hashes = ngram_hashes(ids_BS, torch.zeros_like(ids_BS), ngrams=[8], n_functions=1, n_rows=500_002)
    assert hashes[0, :, 0].tolist() == GOLDEN[8][:2]


@pytest.mark.parametrize(("ngrams", "n_functions"), [((3, 4, 5, 6, 7, 8), 1), ((1, 2, 5), 3)])
def test_forward_and_gradient_are_sums_of_plain_look_ups(ngrams, n_functions):
    n_rows, dim = 53, 16
    ids_BS, doc_BS = random_rows()
    embedding = HashEmbedding(dim, ngrams=ngrams, n_functions=n_functions, n_rows=n_rows)
    torch.nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(*ids_BS.shape, dim, generator=torch.Generator().manual_seed(2))
    out = embedding(ids_BS, doc_BS)
    out.backward(upstream)

    tables = embedding.weight.detach().clone().view(-1, n_rows, dim).requires_grad_()
    hashes = ngram_hashes(ids_BS, doc_BS, ngrams=ngrams, n_functions=n_functions, n_rows=n_rows)
    plain = sum(tables[t][hashes[..., t]] for t in range(len(tables)))
    plain.backward(upstream)
    torch.testing.assert_close(out, plain, atol=SUM_ATOL, rtol=SUM_ATOL)
    torch.testing.assert_close(embedding.weight.grad, tables.grad.view(-1, dim), atol=10 * SUM_ATOL, rtol=SUM_ATOL)
    assert tables.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(ngrams=(), n_functions=1), "hash_ngrams"),
        (dict(ngrams=(4, 3), n_functions=1), "hash_ngrams"),
        (dict(ngrams=(3, 3), n_functions=1), "hash_ngrams"),
        (dict(ngrams=(0, 3), n_functions=1), "hash_ngrams"),
        (dict(ngrams=(3,), n_functions=0), "hash_functions"),
        (dict(ngrams=(3,), n_functions=12), "hash_functions"),
    ],
)
def test_impossible_tables_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        HashEmbedding(8, n_rows=11, **options)
