"""What of a store lies where in Redis, and the steps that change it as a whole.

```
compllm:{<space>}:store             JSON: format version, hidden_size, encoding, and whose records these are
compllm:{<space>}:totals            hash: records, concepts, payload_bytes
compllm:{<space>}:owners            set: the storages that keep concepts here
compllm:{<space>}:owned:<owner>     set: digests of the records that one of them put or found
compllm:{<space>}:record:<key>      a record, see `sealed`
```

`<space>` is a digest of whose records these are; in braces, so that a cluster would keep all of it in one place. Each
step is one script, which Redis runs as a whole: records, sums and owners never disagree, whoever is killed whenever.
Nothing has a time to live.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from compllm_rag.fingerprint import tagged_digest
from compllm_rag.store.packs import corrupt_record, record_checksum

SPACE_VERSION = 1
_HEAD = struct.Struct("<4sIQQ")  # magic, concepts, payload bytes, checksum
HEAD_BYTES = _HEAD.size
_MAGIC = b"CLR1"

# Keys: store, totals, owners, owned, records. Arguments: description, owner, and of each record digest, concepts,
# payload bytes and value. The first of two records under one key stays.
PUT = """
redis.call('SET', KEYS[1], ARGV[1], 'NX')
redis.call('SADD', KEYS[3], ARGV[2])
local new, concepts, payload = 0, 0, 0
for i = 5, #KEYS do
  local at = 3 + (i - 5) * 4
  if redis.call('SETNX', KEYS[i], ARGV[at + 3]) == 1 then
    new, concepts, payload = new + 1, concepts + ARGV[at + 1], payload + ARGV[at + 2]
  end
  redis.call('SADD', KEYS[4], ARGV[at])
end
redis.call('HINCRBY', KEYS[2], 'records', new)
redis.call('HINCRBY', KEYS[2], 'concepts', concepts)
redis.call('HINCRBY', KEYS[2], 'payload_bytes', payload)
return new
"""

# Keys: owners, owned, records. Arguments: owner, digests. What is there belongs to the owner from now on as well, so
# that no compaction of another one takes it away before this one refers to it.
FIND = """
local found = {}
for i = 3, #KEYS do
  found[i - 2] = redis.call('EXISTS', KEYS[i])
  if found[i - 2] == 1 then
    redis.call('SADD', KEYS[1], ARGV[1])
    redis.call('SADD', KEYS[2], ARGV[i - 1])
  end
end
return found
"""

# Keys: totals, owners, owned, records. Arguments: start of the names of what others own, owner, bytes of a record's
# head, digests. A record goes when its last owner gives it up.
GIVE_UP = """
local others = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  if name ~= ARGV[2] then others[#others + 1] = ARGV[1] .. name end
end
local gone, concepts, payload = 0, 0, 0
for i = 4, #KEYS do
  redis.call('SREM', KEYS[3], ARGV[i])
  local needed = false
  for _, other in ipairs(others) do
    needed = needed or redis.call('SISMEMBER', other, ARGV[i]) == 1
  end
  if not needed then
    local head = redis.call('GETRANGE', KEYS[i], 0, ARGV[3] - 1)
    if redis.call('UNLINK', KEYS[i]) == 1 then
      gone = gone + 1
      if #head == tonumber(ARGV[3]) then
        local _, n, bytes = struct.unpack('<c4I4I8', head)
        concepts, payload = concepts + n, payload + bytes
      end
    end
  end
end
redis.call('HINCRBY', KEYS[1], 'records', -gone)
redis.call('HINCRBY', KEYS[1], 'concepts', -concepts)
redis.call('HINCRBY', KEYS[1], 'payload_bytes', -payload)
return {gone, payload}
"""


@dataclass(frozen=True)
class Names:
    """The names in Redis of one store.

    Args:
        space: Whose records these are.
        owner: Who asks.
    """

    space: str
    owner: str

    @property
    def start(self) -> str:
        """What all of them begin with."""
        return f"compllm:{{{tagged_digest('compllm-rag/redis-space/1', space=self.space)}}}:"

    @property
    def store(self) -> str:
        """The description."""
        return f"{self.start}store"

    @property
    def totals(self) -> str:
        """The sums."""
        return f"{self.start}totals"

    @property
    def owners(self) -> str:
        """Who keeps records here."""
        return f"{self.start}owners"

    @property
    def owned_start(self) -> str:
        """What the names of owners' sets begin with."""
        return f"{self.start}owned:"

    @property
    def owned(self) -> str:
        """Digests of the owner's records."""
        return f"{self.owned_start}{self.owner}"

    @property
    def record_start(self) -> str:
        """What the names of records begin with."""
        return f"{self.start}record:"


def sealed(key: str, n_concepts: int, payload: bytes) -> bytes:
    """A record as it lies in Redis: a head with a checksum seeded by its key, then the payload."""
    return _HEAD.pack(_MAGIC, n_concepts, len(payload), record_checksum(key, payload)) + payload


def head_of(key: str, value: bytes) -> tuple[int, int]:
    """Concepts and payload bytes, as the head of a record says.

    Raises:
        CorruptRecordError: There is no such head.
    """
    if len(value) < HEAD_BYTES or not value.startswith(_MAGIC):
        raise corrupt_record(key, f"{len(value)} bytes that do not begin as a record does")
    _, n_concepts, nbytes, _ = _HEAD.unpack_from(value)
    return n_concepts, nbytes


def opened(key: str, value: bytes, row_bytes: int) -> tuple[int, memoryview]:
    """Concepts and payload of a record.

    Args:
        key: Record key.
        value: What lies under it.
        row_bytes: Bytes of one encoded concept.

    Raises:
        CorruptRecordError: It fails its checksum or its bounds.
    """
    n_concepts, nbytes = head_of(key, value)
    payload = memoryview(value)[HEAD_BYTES:]
    if n_concepts < 1 or nbytes != len(payload) or nbytes != n_concepts * row_bytes:
        raise corrupt_record(key, f"{len(payload)} bytes of payload for {n_concepts} concepts")
    if record_checksum(key, payload) != _HEAD.unpack_from(value)[3]:
        raise corrupt_record(key, f"{len(payload)} bytes that fail their checksum, in Redis")
    return n_concepts, payload
