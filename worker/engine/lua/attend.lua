-- Have the reaper look now at an operation that has not ended.
-- KEYS: 1 operation, 2 ATTENTION   ARGV: 1 id
local state = redis.call('HGET', KEYS[1], 'state')
if state and not ENDED[state] then redis.call('ZADD', KEYS[2], seconds(), ARGV[1]) end
