-- Have the reaper look now at an operation that has not ended.
-- KEYS: 1 operation, 2 ATTENTION   ARGV: 1 id
local ended = { succeeded = 1, failed = 1, cancelled = 1, rejected = 1, stuck = 1 }
local state = redis.call('HGET', KEYS[1], 'state')
if state and not ended[state] then redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[1]) end
