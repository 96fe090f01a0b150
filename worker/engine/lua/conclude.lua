-- End an operation: free its instance, hand the claim to whoever waits for it, let the record expire.
-- KEYS: 1 operation, 2 claim, 3 waiting, 4 ATTENTION, 5 progress, 6 undo, 7 waiters, 8 STUCK, 9 HELD
-- ARGV: 1 id, 2 final state, 3 seconds to keep the record (0: for ever), 4 key prefix of operations
-- Returns {'1' when this call ended it, id of the operation that has the claim next or ''}
local now = seconds()
local state = redis.call('HGET', KEYS[1], 'state')
if not state or ENDED[state] then return { '', '' } end

redis.call('HSET', KEYS[1], 'state', ARGV[2], 'ended_at', string.format('%.6f', now))
if ARGV[2] == 'stuck' then
  redis.call('ZADD', KEYS[8], now, ARGV[1])
else
  redis.call('HDEL', KEYS[1], 'verdict') -- that of a stuck one is kept: it may be undone yet
end
redis.call('HDEL', KEYS[1], 'held')
redis.call('SREM', KEYS[9], ARGV[1])
redis.call('DEL', KEYS[5])
redis.call('LREM', KEYS[3], 0, ARGV[1])
if redis.call('EXISTS', KEYS[7]) == 0 then redis.call('ZREM', KEYS[4], ARGV[1]) end
if tonumber(ARGV[3]) > 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  redis.call('EXPIRE', KEYS[6], ARGV[3])
end
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return { '1', '' } end

redis.call('DEL', KEYS[2])
return { '1', pass_on(KEYS[2], KEYS[3], KEYS[4], ARGV[4]) }
