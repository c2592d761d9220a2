"""A bound on the documents of a row, for attention that has room for so many (`model/varlen.py`)."""

from collections.abc import Iterable, Iterator

from blt_titan.batch import Batch
from blt_titan.data.store.errors import DataError


def few_documents(batches: Iterable[Batch], most: int | None) -> Iterator[Batch]:
    """Yield batches on the host, none of whose rows holds more documents than `most`; None allows any number.

    Raises:
        DataError: at the first that does.
    """
    if most is None:
        yield from batches
        return
    for batch in batches:
        # Counted from 0 in each row.
        found = int(batch.layout.byte_doc_BS.max()) + 1
        if found > most:
            raise DataError(
                f"a row holds {found} documents, and model.attention_backend = 'varlen' has room for "
                f"model.varlen_documents = {most}: allow more, or take 'flex', which has no such bound"
            )
        yield batch
