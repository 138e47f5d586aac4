"""What the Redis server runs: each script is one atomic change of the update log.

Every script but CREATE begins with the key of the log and its id, so that a server that was
emptied, or put in the place of another, is noticed before it changes anything. Scripts answer with
a word and what belongs to it. Numbers are exact up to 2**53; what may be larger stays a string.
"""

CREATE = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  if #ARGV == 0 then return {} end
  redis.call('HSET', KEYS[1], 'format', ARGV[1], 'log_id', ARGV[2], 'num_partitions', ARGV[3])
  for at = 2, #KEYS do
    redis.call('HSET', KEYS[at], 'epoch', 0, 'end', 0, 'start', 0, 'token', '')
  end
end
return redis.call('HMGET', KEYS[1], 'format', 'log_id', 'num_partitions')
"""
"""KEYS: log, state of every partition. ARGV: format, log id, L; nothing: only look."""

_GUARD = """
if redis.call('HGET', KEYS[1], 'log_id') ~= ARGV[1] then return {'other'} end
"""

ACQUIRE = (
    _GUARD
    + """
local state = redis.call('HMGET', KEYS[2], 'writer', 'epoch', 'end')
local epoch = tonumber(state[2])
if state[1] ~= ARGV[2] then
  if state[2] ~= ARGV[3] then return {'fenced', epoch} end
  epoch = redis.call('HINCRBY', KEYS[2], 'epoch', 1)
  redis.call('HSET', KEYS[2], 'writer', ARGV[2])
end
return {'done', epoch, tonumber(state[3])}
"""
)
"""KEYS: log, state. ARGV: log id, token, epoch that must be the newest.

Sent again it finds the token, and one that comes too late finds another epoch.
"""

APPEND = (
    _GUARD
    + """
local state = redis.call('HMGET', KEYS[2], 'token', 'epoch', 'end')
local last = tonumber(state[3])
local count, heads, tables = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
if state[1] == ARGV[2] then return {'done', last - count + 1} end
if state[2] ~= ARGV[3] then return {'fenced', tonumber(state[2])} end
if last ~= tonumber(ARGV[4]) then return {'moved', last} end
local at = 8
for position = last + 1, last + count do
  local id = string.format('%.0f-0', position)
  redis.call('XADD', KEYS[3], id, 'r', ARGV[at + 1])
  if ARGV[at] == '1' then redis.call('XADD', KEYS[4], id, 'r', ARGV[at + 1]) end
  at = at + 2
end
for _ = 1, heads do
  redis.call('HSET', KEYS[5], ARGV[at], ARGV[at + 1])
  if ARGV[at + 2] == '0' then
    redis.call('ZREM', KEYS[6], ARGV[at])
  else
    redis.call('ZADD', KEYS[6], ARGV[at + 2], ARGV[at])
  end
  at = at + 3
end
for _ = 1, tables do
  redis.call('HSET', KEYS[7], ARGV[at], ARGV[at + 1])
  at = at + 2
end
redis.call('HSET', KEYS[2], 'end', string.format('%.0f', last + count), 'token', ARGV[2])
return {'done', last + 1}
"""
)
"""KEYS: log, state, records, urgent, heads, expiry, tables.

ARGV: log id, token, epoch, end; how many records, heads and tables; then of each record whether it
is urgent and itself, of each head its item, itself and its expiry, of each table its name and its
version.
"""

LOOK = (
    _GUARD
    + """
local found, at = {'done'}, 2
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  found[#found + 1] = redis.call(unpack(ARGV, at + 1, last))
  at = last + 1
end
return found
"""
)
"""KEYS: log. ARGV: log id; then of each command how many words it has, and these.

A transaction would do, but a server without memory refuses to read in one.
"""

READ = (
    _GUARD
    + """
local state = redis.call('HMGET', KEYS[2], 'start', 'end')
local found, bytes = {}, 0
local after, left = tonumber(ARGV[2]), tonumber(ARGV[3])
local most, head = tonumber(ARGV[4]), tonumber(ARGV[5])
local first = string.format('%.0f-0', after + 1)
while left > 0 and bytes < most do
  local entries = redis.call('XRANGE', KEYS[3], first, '+', 'COUNT', math.min(left, 16))
  for _, entry in ipairs(entries) do
    if bytes >= most then break end
    found[#found + 1] = entry
    bytes = bytes + #entry[2][2] - head
    first = '(' .. entry[1]
  end
  if #entries < 16 then break end
  left = left - #entries
end
return {'done', tonumber(state[1]), tonumber(state[2]), found}
"""
)
"""KEYS: log, state, records or urgent. ARGV: log id, position before the first, most records, most
bytes of payloads, bytes of an entry that are none.
"""

PIN = (
    _GUARD
    + """
local count = #ARGV - 2
for at = 1, count do
  local start = tonumber(redis.call('HGET', KEYS[1 + at], 'start'))
  if tonumber(ARGV[2 + at]) < start then return {'trimmed', at - 1, start} end
end
for at = 1, count do
  redis.call('HSET', KEYS[1 + count + at], ARGV[2], ARGV[2 + at])
end
return {'done'}
"""
)
"""KEYS: log, the states, the pins of every partition. ARGV: log id, name, the cut."""

TRIM = (
    _GUARD
    + """
local state = redis.call('HMGET', KEYS[2], 'start', 'end')
local start = tonumber(state[1])
local upto = math.min(tonumber(ARGV[2]), tonumber(state[2]))
for _, position in ipairs(redis.call('HVALS', KEYS[5])) do
  upto = math.min(upto, tonumber(position))
end
local reached = math.min(upto, start + tonumber(ARGV[3]))
if reached <= start then return {'done', start} end
local first = string.format('%.0f-0', reached + 1)
redis.call('XTRIM', KEYS[3], 'MINID', '=', first)
redis.call('XTRIM', KEYS[4], 'MINID', '=', first)
redis.call('HSET', KEYS[2], 'start', string.format('%.0f', reached))
if reached < upto then return {'more', reached} end
return {'done', reached}
"""
)
"""KEYS: log, state, records, urgent, pins. ARGV: log id, last position to go, most at once.

It trims before it says so: a server without memory refuses what comes first in a script only.
"""
