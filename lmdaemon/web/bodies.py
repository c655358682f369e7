"""The body of a bulk touch, read so that none holds the event loop for long, whatever is in it. Pure, no I/O.

Other bodies are at most 64 KiB, and `dialects.json_object` reads them.
"""

import json

import msgspec

from lmdaemon.dialects import without_mark
from lmdaemon.model import ID_MAX, id_problem
from lmdaemon.shapes import BULK_IDS_MAX, BulkTouch

_DECODER = msgspec.json.Decoder(BulkTouch)
_QUOTES_MAX = 2 * (BULK_IDS_MAX + 1)  # of the ids and the key


def session_ids(body: bytes) -> list[str]:
    """The ids in the body of a bulk touch. Raises ValueError with place and rule.

    It is read straight into a list of texts, so that whatever is no text ends the reading: objects by the million, or a
    look at each of their keys, would take a second.
    """
    body = without_mark(body)
    # Each text has two quotes that are not escaped. A body with more of them is not read: a million texts take 60 ms.
    if body.count(b'"') > _QUOTES_MAX and body.count(b'"') - body.count(b'\\"') > _QUOTES_MAX:
        raise ValueError(f"sessionIds: must be a list of at most {BULK_IDS_MAX} ids")
    ids = _decoded(body)
    if len(ids) > BULK_IDS_MAX:
        raise ValueError(f"sessionIds: must be a list of at most {BULK_IDS_MAX} ids (got {len(ids)})")
    for index, session_id in enumerate(ids):
        problem = id_problem(session_id)
        if problem:
            raise ValueError(f"sessionIds[{index}]: {problem}")
    if body.count(b":") > 1:  # the key may stand twice
        _refuse_contradiction(body, ids)
    return ids


def _decoded(body: bytes) -> list[str]:
    try:
        return _DECODER.decode(body).session_ids
    except msgspec.ValidationError as error:
        what, _, place = str(error)[:ID_MAX].partition(" - at `$.")  # it names a field that is unknown, however long
        raise ValueError(f"{place.rstrip('`') or 'body'}: {what}") from error
    except UnicodeDecodeError as error:
        raise ValueError("body: must be UTF-8") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"malformed JSON: {str(error).removeprefix('JSON is malformed: ')}") from error


def _refuse_contradiction(body: bytes, ids: list[str]) -> None:
    """All that stands under the one key must be equal; of several, the reading has kept the last."""
    if any(value != ids for _, value in json.loads(body, object_pairs_hook=list)):
        raise ValueError("field 'sessionIds' stands twice with different values")
